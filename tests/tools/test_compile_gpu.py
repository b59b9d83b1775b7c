"""tools/compile_gpu.py judges what the compiler wrote: each fault is seen, and a report that cannot be read is one."""
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import compile_gpu  # noqa: E402
import compiler_log  # noqa: E402

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rms_norm_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for rms_norm_mosaic_gpu_kernel
    0 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 28 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 14.342 ms
""" + "".join(f"""I1124 17:00:06.241654   15826 subprocess_compilation.cc:356] ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    0 bytes stack frame, {{xla_spilled}} bytes spill stores, {{xla_spilled}} bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 64 bytes smem, 368 bytes cmem[0]
""" for name in ("loop_pad_fusion_1", "loop_pad_fusion_2"))
SAID = PTXAS.format(spilled=0, xla_spilled=0)
MODULE = """module @matmul attributes {stable_mosaic_gpu.version = 9 : i64} {
    %18 = "stable_mosaic_gpu.arith.constant"() {value = 180320 : i32} : () -> i32
    %20 = "stable_mosaic_gpu.arith.constant"() {value = 1 : index} : () -> index
    %276 = "stable_mosaic_gpu.gpu.launch"(%30, %20, %20, %20, %20, %20, %20, %18) ({
"""
# Two layers of one kernel, one fusion and one copy each, and a head; names and forms as XLA writes them.
HLO = """HloModule jit_forward, is_scheduled=true

%fused_pad (param_0: bf16[1,576]) -> bf16[1,640] {
  %param_0 = bf16[1,576]{1,0} parameter(0)
  ROOT %pad.1 = bf16[1,640]{1,0} pad(%param_0, %constant.1), padding=0_0x0_64
}

ENTRY %main.9 (params_norm.1: bf16[640], x.1: bf16[1,576]) -> bf16[1,576] {
  %params_norm.1 = bf16[640]{0} parameter(0), metadata={op_name="params.norm"}
  %x.1 = bf16[1,576]{1,0} parameter(1), metadata={op_name="x"}
  %loop_pad_fusion.1 = bf16[1,640]{1,0} fusion(%x.1), kind=kLoop, calls=%fused_pad, metadata={op_name="jit(f)/pad"}
  %mpmd_map.1 = bf16[1,640]{1,0} custom-call(%loop_pad_fusion.1, %params_norm.1), custom_call_target="mosaic_gpu_v2", MODULE
  %wrapped_slice = bf16[1,576]{1,0} fusion(%mpmd_map.1), kind=kLoop, calls=%slices
  %loop_pad_fusion.2 = bf16[1,640]{1,0} fusion(%wrapped_slice), kind=kLoop, calls=%fused_pad
  %mpmd_map.2 = bf16[1,640]{1,0} custom-call(%loop_pad_fusion.2, %params_norm.1), custom_call_target="mosaic_gpu_v2", MODULE
  ROOT %wrapped_slice.1 = bf16[1,576]{1,0} fusion(%mpmd_map.2), kind=kLoop, calls=%slices
}
"""
SEQUENCE = """000: kCommandBuffer [source | sink]
    001: kCustomKernel [source       | next=002 (1)] loop_pad_fusion_1 grid: [5, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
    002: kCustomCall   [prev=001 (1) | next=003 (1)] kCustomCall
    003: kCopy         [prev=002 (1) | next=004 (1)] kCopy
    004: kCustomKernel [prev=003 (1) | next=005 (1)] loop_pad_fusion_2 grid: [5, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
    005: kCustomCall   [prev=004 (1) | next=006 (1)] kCustomCall
    006: kCopy         [prev=005 (1) | sink        ] kCopy
"""
METADATA = """thunk_metadata {
  thunk_info {
    profile_annotation: "command_buffer_1"
  }
  thunk_kind: "kCommandBuffer"
}
""" + "".join(f"""thunk_metadata {{
  thunk_info {{
    profile_annotation: "{name}"
    thunk_id: {number}
  }}
}}
""" for number, name in enumerate(("loop_pad_fusion.1", "mpmd_map.1", "wrapped_slice", "loop_pad_fusion.2", "mpmd_map.2", "wrapped_slice.1"), 1))


@pytest.fixture(scope="module")
def hlo():
    """HLO with the module of a real kernel in it, as jax lowers it."""
    from pallas_kernels import mosaic_rows
    x, weight = jax.ShapeDtypeStruct((1, 640), jnp.bfloat16), jax.ShapeDtypeStruct((640,), jnp.bfloat16)
    lowered = jax.jit(lambda x, w: mosaic_rows.rms_norm(x, w, 1e-5)).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    return HLO.replace("MODULE", "backend_config={" + re.search(r'module = "(?:[^"\\]|\\.)*"', lowered)[0] + "}")


def judged(tmp_path, hlo, *, log=SAID, sequence=SEQUENCE, metadata=METADATA, temporaries=0, memory=True, donated=0,
           aliased=0, known=None, error=None):
    """compile_gpu's report on a program of which the compiler says these things."""
    class Lowered:
        def compile(self):
            if error:
                raise error
            for part, text in (("thunk_sequence_after_thunk_passes", sequence), ("thunk_metadata", metadata)):
                if text is not None:
                    (tmp_path / f"module_0001.jit_forward.{part}.txt").write_text(text)
            compile_gpu.os.write(2, log.encode())
            size = types.SimpleNamespace(temp_size_in_bytes=temporaries, alias_size_in_bytes=aliased)
            return types.SimpleNamespace(as_text=lambda: hlo, memory_analysis=lambda: size if memory else None)
    function = types.SimpleNamespace(lower=lambda: Lowered())
    return compile_gpu.compiled("forward", function, (), step=True, layers=2, donated=donated, known={} if known is None else known, dump=tmp_path)


def test_a_sound_program_is_reported_whole(tmp_path, hlo):
    report = judged(tmp_path, hlo, aliased=5, donated=5)
    assert report["faults"] == []
    (kernel,) = report["kernels"]
    assert kernel == {"kernel": "rms_norm", "registers": 28, "spill_bytes": 0, "shared_memory": kernel["shared_memory"]}
    assert 0 < kernel["shared_memory"] < 227 * 1024
    assert report["xla_kernels"] == [
        {"kernel": f"loop_pad_fusion_{n}", "registers": 12, "spill_bytes": 0, "shared_memory": 64} for n in (1, 2)]
    assert report["inside"] == {"xla loop_pad_fusion": 2, "rms_norm": 2, "copy bf16[1,576]": 2}
    assert report["per_layer"] == 3 and report["one_layer"] == ["rms_norm", "copy bf16[1,576]", "xla loop_pad_fusion"]


@pytest.mark.parametrize("change, fault", [
    (dict(error=ValueError("no such instruction")), "no such instruction"),
    (dict(log=PTXAS.format(spilled=8, xla_spilled=0)), "spills: [{'kernel': 'rms_norm'"),
    (dict(log=PTXAS.format(spilled=0, xla_spilled=8)), "spills: [{'kernel': 'loop_pad_fusion_1'"),
    (dict(log="ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored\n" + SAID), "slow: [\"'setmaxnreg' ignored"),
    (dict(log=SAID.replace("'loop_pad_fusion_2'", "'another'")), "ptxas says nothing of the kernel loop_pad_fusion_2"),
    (dict(temporaries=(1 << 30) + 1), "GiB of temporaries"),
    (dict(donated=7, aliased=5), "2 bytes of the donated buffers are copied"),
    (dict(sequence=SEQUENCE.replace("000: kCommandBuffer", "000: kSequential")), "not one command buffer"),
    (dict(sequence=SEQUENCE + "007: kCopy [] kCopy\n"), "not one command buffer"),
    (dict(log=""), "ptxas says nothing of the kernel rms_norm"),
    (dict(log=SAID.replace("Used 28 registers", "28 registers in use")), "registers and spills"),
    (dict(memory=False), "cannot be read"),
    (dict(sequence=None), "dumped no thunk_sequence"),
    (dict(metadata=None), "dumped no thunk_metadata"),
    (dict(sequence="nothing of use"), "thunk sequence is empty"),
    (dict(sequence=SEQUENCE.replace("loop_pad_fusion_1 grid:", "loop_pad_fusion_1 blocks:")), "names no kernel"),
])
def test_each_fault_is_found(tmp_path, hlo, change, fault):
    report = judged(tmp_path, hlo, **change)
    assert len(report["faults"]) == 1 and fault in report["faults"][0], report["faults"]


def test_a_mosaic_call_without_a_module_is_a_fault(tmp_path):
    report = judged(tmp_path, HLO.replace("MODULE", "backend_config={}"))
    assert len(report["faults"]) == 1 and "carries no module" in report["faults"][0]


def test_a_kernel_that_the_process_compiled_before_is_still_reported(tmp_path, hlo):
    known = {}
    first = judged(tmp_path, hlo, known=known)
    without = SAID[SAID.index("I1124"):]
    assert judged(tmp_path, hlo, known=known, log=without) | {"seconds": 0} == first | {"seconds": 0}


TRITON = HLO.replace('custom_call_target="mosaic_gpu_v2", MODULE', 'custom_call_target="__gpu$xla.gpu.triton", backend_config={}')
# XLA numbers kernels of one name from the second on.
TRITON_SEQUENCE = SEQUENCE
for line, name in (("002", "rms_norm"), ("005", "rms_norm__1")):
    launch = rf"{line}: kCustomKernel \1] {name} grid: [1, 1, 1] threads: [128, 1, 1]  shared_memory: 16 bytes"
    TRITON_SEQUENCE = re.sub(rf"{line}: kCustomCall (.*)\] kCustomCall", launch, TRITON_SEQUENCE)
TRITON_SAID = "".join(SAID.replace("rms_norm_mosaic_gpu_kernel", name) for name in ("rms_norm", "rms_norm__1"))


def test_triton_kernels_are_reported_with_their_shared_memory(tmp_path):
    report = judged(tmp_path, TRITON, sequence=TRITON_SEQUENCE, log=TRITON_SAID)
    assert report["faults"] == []
    # One byte is the kernel's own, 16 are asked for at its launch.
    assert report["kernels"] == [
        {"kernel": name, "registers": 28, "spill_bytes": 0, "shared_memory": 17} for name in ("rms_norm", "rms_norm__1")]
    assert report["inside"]["rms_norm"] == 2 and report["one_layer"] == ["rms_norm", "copy bf16[1,576]", "xla loop_pad_fusion"]


@pytest.mark.parametrize("change, fault", [
    (dict(log=SAID.replace("rms_norm_mosaic_gpu_kernel", "rms_norm")), "ptxas says nothing of the kernel rms_norm__1"),
    (dict(log=TRITON_SAID.replace("0 bytes spill stores", "4 bytes spill stores", 1)), "spills: [{'kernel': 'rms_norm'"),
    (dict(sequence=SEQUENCE), "the Triton call mpmd_map.1 launches no kernel"),
])
def test_each_fault_of_a_triton_kernel_is_found(tmp_path, change, fault):
    report = judged(tmp_path, TRITON, **dict(sequence=TRITON_SEQUENCE, log=TRITON_SAID) | change)
    assert len(report["faults"]) == 1 and fault in report["faults"][0], report["faults"]


def test_a_few_launches_outside_a_graph_are_no_fault_and_a_loop_is(tmp_path, hlo):
    few = "".join(line[4:] for line in SEQUENCE.splitlines(keepends=True)[1:3])
    assert judged(tmp_path, hlo, sequence=few)["faults"] == []
    assert "kWhile" in judged(tmp_path, hlo, sequence=few + "007: kWhile [] c\n")["faults"][0]


def weight_use(line, computation=""):
    return compiler_log.computations(f"""HloModule m

{computation}
ENTRY %main (w: bf16[128,600]) -> bf16[1] {{
  %w.1 = bf16[128,600]{{1,0}} parameter(0), metadata={{op_name="params.layers[0].q.weight"}}
  %cache.1 = bf16[8,128,600]{{2,1,0}} parameter(1), metadata={{op_name="cache.k[0]"}}
  %view.1 = bf16[76800]{{0}} bitcast(%w.1)
  {line}
}}
""")


@pytest.mark.parametrize("line", [
    "%pad.1 = bf16[128,640]{1,0} pad(%w.1, %zero), padding=0_0x0_40",
    "%copy.1 = bf16[76800]{0} copy(%view.1)",
    "%c = (bf16[128,600]{0,1}, bf16[128,600]{1,0}, u32[]) copy-start(%w.1)",
    "%convert.3 = f32[128,600]{1,0} convert(%w.1)",
    "%loop_pad_fusion = bf16[128,640]{1,0} fusion(%w.1), kind=kLoop, calls=%fused",
])
def test_a_pass_over_a_weight_is_found(line):
    padding = "%fused (p: bf16[128,600]) -> bf16[128,640] {\n  ROOT %pad.9 = bf16[128,640]{1,0} pad(%p, %z), padding=0_0x0_40\n}\n"
    (found,) = compiler_log.copies(weight_use(line, padding), "params")
    assert found.startswith("params.layers[0].q.weight bf16[128,600] -> ")


@pytest.mark.parametrize("line, inner", [
    ('%mpmd_map.1 = f32[4096,128]{1,0} custom-call(%x, %w.1), custom_call_target="mosaic_gpu_v2"', ""),
    ("%dot.1 = f32[4096,128]{1,0} dot(%x, %w.1), lhs_contracting_dims={1}", ""),
    ("%gemm_fusion = f32[4096,128]{1,0} fusion(%x, %w.1), kind=kCustom, calls=%fused", "%dot.2 = f32[4096,128]{1,0} dot(%a, %b)"),
    ("%loop_gather_fusion = bf16[4096,600]{1,0} fusion(%w.1, %x), kind=kLoop, calls=%fused", "%gather.1 = bf16[4096,600]{1,0} gather(%a, %b)"),
    ("%loop_slice_fusion = bf16[1,600]{1,0} fusion(%w.1, %x), kind=kLoop, calls=%fused", "%slice.1 = bf16[1,600]{1,0} slice(%a)"),
])
def test_using_a_weight_is_no_pass_over_it(line, inner):
    computation = f"%fused (a: f32[2], b: f32[2]) -> f32[2] {{\n  ROOT {inner}\n}}\n" if inner else ""
    assert compiler_log.copies(weight_use(line, computation), "params") == []


def test_a_copied_cache_is_found_and_one_updated_in_place_is_none():
    copied = weight_use("%copy.7 = bf16[8,128,600]{2,1,0} copy(%cache.1)")
    assert compiler_log.copies(copied, "params") == [] and len(compiler_log.copies(copied, "cache")) == 1
    written = weight_use("%scatter.7 = bf16[8,128,600]{2,1,0} scatter(%cache.1, %slots, %new)")
    assert compiler_log.copies(written, "cache") == []


def test_a_launch_names_its_kernel_and_its_shared_memory():
    assert compiler_log.launch_of(MODULE) == {"kernel": "matmul", "shared_memory": 180320}
    for broken in (MODULE.replace("gpu.launch", "gpu.start"), MODULE.replace("value = 180320", "amount = 180320"), ""):
        with pytest.raises(ValueError, match="shared memory"):
            compiler_log.launch_of(broken)


def test_instructions_of_a_loop_are_read_where_the_loop_stands():
    parts = compiler_log.computations("""HloModule m

%body (p: s32[]) -> s32[] {
  ROOT %inner = s32[] add(%p, %p)
}

%condition (p: s32[]) -> pred[] {
  ROOT %test = pred[] compare(%p, %p), direction=LT
}

ENTRY %main (a: s32[]) -> s32[] {
  %before = s32[] negate(%a)
  %while.1 = s32[] while(%before), condition=%condition, body=%body
  ROOT %after = s32[] negate(%while.1)
}
""")
    assert [i.name for i in compiler_log.executed(parts)] == ["before", "while.1", "test", "inner", "after"]


def test_the_engine_programs_are_the_runners_own_and_donate_what_it_donates():
    from pallas_kernels import dispatch
    programs = list(compile_gpu.engine_programs("smollm2-135m", "h200", jax.ShapeDtypeStruct, dispatch.SERVING, 1, False))
    names = [name.removeprefix("smollm2-135m ") for name, *_ in programs]
    assert names == ["decode 1", "decode 64", "decode 256", "prefill 16", "prefill 2048", "prefill 8192",
                     *(f"draw {kind} {rows}" for rows in (1, 256) for kind in ("greedy", "random", "everything")), "score 2048"]
    features = programs[8][3]["features"]
    assert features.random and features.truncated and features.masked and features.edits and features.top_logprobs == 20
    name, forward, arguments, static, layers, donated = programs[0]
    text = forward.lower(*arguments, **static).as_text()
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == 2  # k and v of the one layer
    cache = arguments[1]
    assert donated == 2 * 2 * cache.k[0].size and cache.k[0].shape[1:] == (16, 3, 64)
