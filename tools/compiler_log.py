"""What the GPU compiler wrote about a program, read as data: ptxas's lines, optimized HLO, thunk sequences. Text in, no jax."""
import dataclasses
import math
import re
from collections import Counter

PASSED_ON = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier")      # the same bytes under another name
COMPUTES = ("dot", "convolution", "custom-call", "gather", "scatter", "dynamic-update-slice")  # multiply, read a part, write in place
NO_COPIES = ("parameter", "constant", "while", "call", "conditional", *COMPUTES, *PASSED_ON)
CONTAINERS = {"kCommandBuffer", "kSequential", "kWhile", "kConditional"}  # thunks that hold others and launch nothing themselves
KERNELS = {"kCustomKernel", "kKernel"}  # thunks that launch a kernel which XLA compiled, Triton's among them
LAUNCHES = KERNELS | {"kCustomCall", "kCopy", "kMemset32BitValue", "kMemzero"}  # thunks that only start work
TRITON_CALL = 'custom_call_target="__gpu$xla.gpu.triton"'
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str                   # "bf16[1,640]{1,0}", or a tuple of such
    opcode: str
    operands: tuple[str, ...]
    line: str

    @property
    def op_name(self) -> str:
        """The path of jax functions that it comes from; of a parameter its path in the arguments."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.line)
        return found[1] if found else ""

    @property
    def elements(self) -> int:
        """Of the largest array in its type."""
        shapes = re.findall(r"\w+\[([\d,]*)\]", self.type)
        return max((math.prod(int(n) for n in shape.split(",") if n) for shape in shapes), default=0)

    @property
    def calls(self) -> list[str]:
        """The computations it runs: a fusion's, a loop's condition and body."""
        return re.findall(r"(?:calls|to_apply|condition|body)=%([\w.\-]+)", self.line.split(", backend_config")[0])


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation, in their order; the entry's under "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in hlo.splitlines():
        if not line.startswith(" "):
            start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if start:
                current = found["ENTRY" if start[1] else start[2]] = []
        elif m := INSTRUCTION.match(line):
            current.append(Instruction(m[1], m[2], m[3], tuple(re.findall(r"%([\w.\-]+)", m[4].split(")")[0])), line))
    return found


def executed(parts: dict[str, list[Instruction]], name: str = "ENTRY"):
    """Every instruction reached from the entry, in the order in which it is compiled: a loop's body at the loop."""
    for instruction in parts.get(name, ()):
        yield instruction
        for called in instruction.calls:
            yield from executed(parts, called)


def mosaic_module(instruction: Instruction) -> bytes | None:
    """The kernel that a custom call carries, as MLIR bytecode; None if it is no Mosaic call.

    ValueError: it is one and carries no module where this looks for it.
    """
    if 'custom_call_target="mosaic_gpu' not in instruction.line:
        return None
    found = re.search(r'\bmodule = "((?:[^"\\]|\\.)*)"', instruction.line)
    if not found:
        raise ValueError(f"the Mosaic call {instruction.name} carries no module: jax writes it in another way than this file reads")
    plain = {b"n": b"\n", b"t": b"\t"}
    return re.sub(rb'\\([0-9A-Fa-f]{2}|\\|"|n|t)', lambda m: bytes([int(m[1], 16)]) if len(m[1]) == 2 else plain.get(m[1], m[1]),
                  found[1].encode("latin-1"))


def launch_of(module: str) -> dict:
    """{kernel, shared_memory} of a Mosaic kernel's module as text: its name and the bytes its launch asks for."""
    name, launch = re.search(r"module @(\w+)", module), re.search(r'"[\w.]*gpu\.launch"\(([^)]*)\)', module)
    last = launch[1].split(",")[-1].strip() if launch else None  # the operand dynamicSharedMemorySize
    size = re.search(rf'{re.escape(last)} = "[\w.]*arith\.constant"\(\)[^\n]*?value = (\d+) : i32', module) if last else None
    if not (name and size):
        raise ValueError("a Mosaic module names no kernel or no launch with a constant shared memory size")
    return {"kernel": name[1], "shared_memory": int(size[1])}


def ptxas(log: str) -> list[dict]:
    """What ptxas said of each kernel it compiled: name, registers, bytes spilled, and the bytes of shared memory that it has
    without asking for them at its launch. ValueError on a line that does not read.
    """
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        name, registers = part.split("'")[0].removesuffix("_mosaic_gpu_kernel"), re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not (registers and spilled):
            raise ValueError(f"ptxas says nothing readable of {name}'s registers and spills")
        static = re.search(r"(\d+) bytes smem", part)
        found.append({"kernel": name, "registers": int(registers[1]), "spill_bytes": sum(map(int, spilled.groups())),
                      "shared_memory": int(static[1]) if static else 0})
    return found


def losses(log: str) -> list[str]:
    """What ptxas calls a loss of performance: a wgmma that waits for the one before, registers that do not change hands."""
    return re.findall(r"Potential Performance Loss: ([^\n]*)", log)


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One line of a program's thunk sequence."""

    depth: int
    kind: str
    name: str           # of its HLO instruction, or ""
    kernel: str         # that it launches, where XLA compiled one, or ""
    shared_memory: int  # bytes asked for at the launch


def thunks(sequence: str, metadata: str) -> list[Thunk]:
    """A program's thunks in their order; ValueError if there are none.

    `sequence` is XLA's dump after its passes; `metadata` names the HLO instruction of each, by number.
    """
    names = {}
    for entry in metadata.split("thunk_metadata {")[1:]:
        name, number = re.search(r'profile_annotation: "([^"]*)"', entry), re.search(r"thunk_id: (\d+)", entry)
        if name:
            names[int(number[1]) if number else 0] = name[1]
    found = []
    for line in sequence.splitlines():
        if m := re.match(r"(\s*)(\d+): (k\w+)", line):
            kernel = re.search(r"\] (\S+) grid: .*shared_memory: (\d+) bytes", line)
            found.append(Thunk(len(m[1]), m[3], names.get(int(m[2]), ""), *((kernel[1], int(kernel[2])) if kernel else ("", 0))))
    if not found:
        raise ValueError("the thunk sequence is empty or written in another way than this file reads")
    return found


def xla_kernels(found: list[Thunk], instructions: dict[str, Instruction],
                said: list[dict]) -> tuple[list[dict], list[dict], dict[str, str]]:
    """What is known of the Triton kernels and of XLA's own that a program launches, and {name of a Triton call: kernel}.

    XLA compiles both, some of them twice: what took more counts. ValueError where ptxas said nothing of one.
    """
    ours, xlas, calls = {}, {}, {}
    for thunk in found:
        if not thunk.kernel:
            if thunk.kind in KERNELS:
                raise ValueError(f"the launch {thunk.name} names no kernel: XLA writes it in another way than this file reads")
            continue
        entries = [entry for entry in said if entry["kernel"] == thunk.kernel]
        if not entries:
            raise ValueError(f"ptxas says nothing of the kernel {thunk.kernel}")
        most = {key: max(entry[key] for entry in entries) for key in ("registers", "spill_bytes", "shared_memory")}
        kernel = {"kernel": thunk.kernel} | most | {"shared_memory": most["shared_memory"] + thunk.shared_memory}
        if TRITON_CALL in (instructions[thunk.name].line if thunk.name in instructions else ""):
            calls[thunk.name] = re.sub(r"__\d+$", "", thunk.kernel)  # XLA numbers kernels of one name
            ours[thunk.kernel] = kernel
        else:
            xlas[thunk.kernel] = kernel
    silent = [i.name for i in instructions.values() if TRITON_CALL in i.line and i.name not in calls]
    if silent:
        raise ValueError(f"the Triton call {silent[0]} launches no kernel")
    return list(ours.values()), list(xlas.values()), calls


def kind_of(thunk: str, name: str, instructions: dict[str, Instruction], kernels: dict[str, str]) -> str:
    """What a launch is: a Pallas kernel's name, a copy's or a library call's type, or the kind of an XLA fusion."""
    instruction = instructions.get(name)
    if name in kernels:
        return kernels[name]
    if thunk == "kCopy" and instruction:
        return f"copy {instruction.type.lstrip('(').split('{')[0]}"
    if thunk in KERNELS and name:
        return "xla " + re.sub(r"\.\d+|\.clone", "", re.sub(r"\.remat\w*", " rematerialized", name))
    target = re.search(r'custom_call_target="([^"]*)"', instruction.line) if instruction else None
    return f"{thunk} {target[1]}" if target else thunk


def launches(found: list[Thunk], instructions: dict[str, Instruction], kernels: dict[str, str], layers: int) -> dict:
    """{top, inside, launches, per_layer, one_layer}: the outermost thunks, launches by kind and in all, all / layers, one layer's.

    A layer is what lies between two launches of a kind that occurs once a layer, a Pallas kernel where there is one; without
    such a kind the list is empty.
    """
    outer = min(thunk.depth for thunk in found)
    top = [thunk.kind for thunk in found if thunk.depth == outer]
    names = [kind_of(thunk.kind, thunk.name, instructions, kernels) for thunk in found if thunk.kind not in CONTAINERS]
    counted = Counter(names)
    candidates = [name for name in names if counted[name] == layers]
    once = next((n for n in candidates if n in kernels.values()), candidates[0] if candidates else None) if layers > 1 else None
    at = [i for i, name in enumerate(names) if name == once][layers // 2 - 1:layers // 2 + 1] if once else []
    return {"top": top, "inside": dict(counted.most_common()), "launches": len(names),
            "per_layer": round(len(names) / layers, 1) if layers else None, "one_layer": names[at[0]:at[1]] if at else []}


def copies(parts: dict[str, list[Instruction]], root: str) -> list[str]:
    """Passes over a matrix among the arguments under `root`: operations that write at least half as many numbers as it holds.

    A pad, a transpose, a conversion or a copy of a weight inside a step costs its bytes twice in every step. Products,
    gathers, updates in place, and calls to kernels and libraries, alone or in a fusion, are no copies.
    """
    held: dict[str, Instruction] = {}
    found = []
    for instruction in parts["ENTRY"]:
        sources = [held[name] for name in instruction.operands if name in held]
        if instruction.opcode == "parameter":
            if re.match(rf"{root}\b", instruction.op_name) and re.search(r"\[\d+(,\d+)+\]", instruction.type):
                held[instruction.name] = instruction
        elif instruction.opcode in PASSED_ON and len(sources) == 1:
            held[instruction.name] = sources[0]
        elif instruction.opcode not in NO_COPIES:
            inner = [i.opcode for name in instruction.calls for i in parts.get(name, ())]
            for source in sources if not set(inner) & set(COMPUTES) else ():
                if 2 * instruction.elements >= source.elements:
                    before, after = (i.type.split("{")[0] for i in (source, instruction))
                    found.append(f"{source.op_name} {before} -> {instruction.name} {after}")
    return found
