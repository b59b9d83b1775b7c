"""What the README shows runs as it stands."""
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert names["scores"].shape == (3,) and names["twin"].params is names["params"]
