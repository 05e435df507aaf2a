"""The house stands as drawn: floors, siblings, no cycles, no pickles, one reader of the environment, a light start.

A failing test here names the file and line; docs/architecture.md says why the rule is there.
"""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "meshwright"
PACKAGE = "meshwright"

#: Every room, a top-level module or package, by its floor. A floor imports only floors below it.
FLOORS: dict[str, int] = {
    # words
    **dict.fromkeys(
        (
            *("errors", "env", "divisors", "files", "disk", "storage", "job", "cluster", "card", "layout", "placement"),
            *("run", "accelerators", "families.card"),
        ),
        0,
    ),
    # thinking and starting
    **dict.fromkeys(("plan", "report", "launch"), 1),
    # matter
    **dict.fromkeys(
        ("nn", "process_group", "tasks", "data", "parallel", "checkpoint", "trace", "probe", "families.module"), 2
    ),
    # work
    **dict.fromkeys(("train", "engine"), 3),
    # outer loops
    **dict.fromkeys(("verify", "rehearse", "serve"), 4),
    # the top: what a person types
    **dict.fromkeys(("verbs",), 5),
    **dict.fromkeys(("cli",), 6),
    **dict.fromkeys(("__main__",), 7),
}
#: The rooms inside plan/ by their floors there.
PLAN_FLOORS: dict[str, int] = {
    **dict.fromkeys(("plan.pipeline", "plan.reliability"), 0),
    **dict.fromkeys(("plan.rules", "plan.request"), 1),
    "plan.workload": 2,
    "plan.constants": 3,
    **dict.fromkeys(("plan.cost", "plan.advice"), 4),
    **dict.fromkeys(("plan.result", "plan.cases"), 5),
    **dict.fromkeys(("plan.search", "plan.serving", "plan.calibrate"), 6),
    "plan.mixed": 7,
    "plan": 8,
}
TORCH_FROM_FLOOR = 2

#: Inside a floor packages do not import each other, but for these.
SIBLINGS = {
    ("report", "plan"),
    ("parallel", "nn"),
    ("probe", "nn"),
    ("parallel", "process_group"),
    ("probe", "process_group"),
    ("tasks", "nn"),
    ("families.module", "nn"),
}
#: On this floor modules may see each other: words make sentences.
OPEN_FLOORS = {0}

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
PICKLING_CALLS = {"torch.load", "torch.save"}
#: Collectives of torch.distributed that pickle what they carry.
OBJECT_COLLECTIVES = re.compile(r"\b(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?$")


@dataclass(frozen=True)
class Edge:
    """One import: module `source` names module or third-party package `target` at `place`."""

    source: str
    target: str
    place: str


def python_files(*folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """ "plan.rules" for src/meshwright/plan/rules/table.py, "plan" for its __init__.py, "" for the root's."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(SOURCE)}


def inner(name: str) -> str:
    """The module of ours that a dotted name (without "meshwright.") stands for: itself or the one that holds it."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def imports(path: Path) -> Iterator[Edge]:
    """Every import statement of a file, those inside functions too. Ours are named without "meshwright."."""
    source = module_name(path)
    for node in ast.walk(parse(path)):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place}: relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == PACKAGE:
                yield Edge(source, "." + inner(name.partition(".")[2]), place)
            else:
                yield Edge(source, name, place)


def component(module: str) -> str:
    """What FLOORS knows a module as: its top-level name; a family's two files are on two floors."""
    parts = module.split(".")
    if parts[0] == "families":
        return f"families.{parts[2]}" if len(parts) > 2 else "families.card"
    return parts[0]


def room_of_plan(module: str) -> str:
    """What PLAN_FLOORS knows a module of plan/ as: its package there, or the file itself."""
    return ".".join(module.split(".")[:2])


def allowed(source: str, target: str) -> bool:
    if source == target:
        return True
    high, low = FLOORS[source], FLOORS[target]
    return low < high or (low == high and high in OPEN_FLOORS) or (source, target) in SIBLINGS


ALL_EDGES = [edge for path in MODULES.values() for edge in imports(path)]
OUR_EDGES = [Edge(edge.source, edge.target[1:], edge.place) for edge in ALL_EDGES if edge.target.startswith(".")]


def test_every_module_has_a_floor() -> None:
    unknown = {component(module) for module in MODULES if module} - set(FLOORS)
    unknown |= {room_of_plan(module) for module in MODULES if component(module) == "plan"} - set(PLAN_FLOORS)
    assert not unknown, f"give these a floor in FLOORS (and in docs/architecture.md): {sorted(unknown)}"


def test_imports_go_down() -> None:
    wrong = [
        f"{edge.place}: {edge.source} (floor {FLOORS[component(edge.source)]}) imports "
        f"{edge.target} (floor {FLOORS[component(edge.target)]})"
        for edge in OUR_EDGES
        if edge.target and edge.source and not allowed(component(edge.source), component(edge.target))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_imports_inside_plan_go_down() -> None:
    wrong = [
        f"{edge.place}: {source} (floor {PLAN_FLOORS[source]}) imports {target} (floor {PLAN_FLOORS[target]})"
        for edge in OUR_EDGES
        for source, target in [(room_of_plan(edge.source), room_of_plan(edge.target))]
        if source in PLAN_FLOORS and target in PLAN_FLOORS
        if source != target and PLAN_FLOORS[target] >= PLAN_FLOORS[source]
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def drawn(page: str, heading: str) -> dict[str, set[str]]:
    """The diagram under a heading of a page: lines "room -> the rooms it imports"."""
    block = re.search(rf"^#+ {heading}$.*?^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None, f"docs/architecture.md has no diagram under '{heading}'"
    lines = [line.partition("->") for line in block[1].splitlines() if line.strip()]
    return {room.split()[-1]: set(targets.split()) for room, _, targets in lines}


def imported(room: Callable[[str], str], rooms: Iterable[str]) -> dict[str, set[str]]:
    """Each of `rooms` and the others of them that its modules import."""
    found: dict[str, set[str]] = {one: set() for one in rooms}
    for edge in OUR_EDGES:
        source, target = room(edge.source), room(edge.target)
        if source in found and target in found and source != target:
            found[source].add(target)
    return found


def test_the_diagrams_of_the_rooms_are_the_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert drawn(page, "Rooms") == imported(component, set(FLOORS) - {"__main__"})
    plan = {one.removeprefix("plan."): {two.removeprefix("plan.") for two in targets}
            for one, targets in imported(room_of_plan, set(PLAN_FLOORS) - {"plan"}).items()}  # fmt: skip
    assert drawn(page, "Rooms of plan") == plan


def test_a_wrong_diagram_would_be_found() -> None:
    page = "# Rooms\nsome words\n```text\n1  plan -> cluster card\n0  card ->\n```\n"
    assert drawn(page, "Rooms") == {"plan": {"cluster", "card"}, "card": set()}


def test_every_room_has_a_line_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {str(path.parent.relative_to(SOURCE)) for path in SOURCE.rglob("__init__.py")} - {".", "families/llama"}
    assert [package for package in sorted(packages) if f"`{package}/`" not in page] == []


def test_the_root_imports_nothing_of_ours() -> None:
    assert [edge for edge in OUR_EDGES if edge.source == ""] == []


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("train", "plan", True),
        ("plan", "train", False),
        ("train", "engine", False),
        ("report", "plan", True),
        ("plan", "report", False),
        ("data", "nn", False),
        ("tasks", "nn", True),
        ("families.card", "families.module", False),
        ("job", "errors", True),
    ],
)
def test_the_rule_itself(source: str, target: str, expected: bool) -> None:
    assert allowed(source, target) is expected


def test_no_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for edge in OUR_EDGES:
        if edge.target and edge.target != edge.source:
            graph[edge.source].add(edge.target)
    assert find_cycle(graph) is None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph[module]):
            if found := visit(target, [*trail, module]):
                return found
        done.add(module)
        return None

    return next((found for module in graph if (found := visit(module, []))), None)


def test_a_cycle_would_be_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def third_party(name: str) -> list[Edge]:
    return [edge for edge in ALL_EDGES if not edge.target.startswith(".") and edge.target.split(".")[0] == name]


def test_ray_is_in_one_file() -> None:
    assert [edge for edge in third_party("ray") if edge.source != "launch.ray"] == []


def test_torch_is_matter() -> None:
    assert [edge for edge in third_party("torch") if FLOORS[component(edge.source)] < TORCH_FROM_FLOOR] == []


def test_pydantic_reads_files_and_requests() -> None:
    for package in ("pydantic", "pydantic_core"):
        assert [
            edge for edge in third_party(package) if component(edge.source) not in ("job", "cluster", "serve")
        ] == []


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(path: Path) -> Iterator[tuple[str, ast.Call, str]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_pickles_in_the_sources() -> None:
    files = python_files(SOURCE, ROOT / "examples", ROOT / "bench")
    found = [
        f"{path.relative_to(ROOT)}: imports {name}"
        for path in files
        for node in ast.walk(parse(path))
        for name in _imported_tops(node)
        if name in PICKLERS
    ]
    for path in files:
        for name, call, place in calls(path):
            pickled_array = name.endswith("load") and any(
                keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False
                for keyword in call.keywords
            )
            if name in PICKLING_CALLS or OBJECT_COLLECTIVES.search(name) or pickled_array:
                found.append(f"{place}: calls {name}")
    # the `.metadata` of torch's own distributed checkpoints is a pickle
    found += [edge.place for edge in ALL_EDGES if edge.target.startswith("torch.distributed.checkpoint")]
    assert found == []


def _imported_tops(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_the_environment_is_read_in_one_file() -> None:
    readers = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files(SOURCE)
        if module_name(path) != "env"
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.environb", "os.getenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    }
    assert readers == set()


def test_nothing_is_caught_in_silence() -> None:
    silent = []
    for path in python_files(SOURCE):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = dotted(node.type) if node.type is not None else "everything"
                passes = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
                if caught in ("everything", "Exception", "BaseException") and passes:
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []


def test_nothing_is_left_for_later() -> None:
    words = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    left = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files(SOURCE, ROOT / "examples", ROOT / "bench")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert left == []


def test_files_and_functions_stay_readable() -> None:
    """The aim is 400 lines a file and 60 a function; a tenth more is let pass, so that nobody splits for a line."""
    long = []
    for path in python_files(SOURCE):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 440:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > 66:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {size} lines")
    assert long == []


def test_tests_mirror_the_package() -> None:
    """A folder of tests is named for a package, so that a test is found where its subject is."""
    packages = {path.parent.relative_to(SOURCE) for path in SOURCE.rglob("__init__.py")}
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert {str(folder) for folder in folders if folder not in packages} == set()


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from meshwright.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'grpc', 'starlette', 'tokenizers', 'fsspec'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "verbs:" in done.stdout


def test_floors_below_matter_run_without_torch() -> None:
    modules = [module for module in MODULES if module and FLOORS[component(module)] < TORCH_FROM_FLOOR]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module('meshwright.' + name)\n"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """`meshwright --help` takes at most ten times the work of an empty Python: seconds of CPU, which other processes
    do not lengthen, the best of five."""

    def seconds(*words: str) -> float:
        used = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *words], check=True, capture_output=True, timeout=60)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(used)

    assert seconds("-m", "meshwright", "--help") < 10 * seconds("-c", "pass")


def documents() -> list[Path]:
    return [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]


def code_blocks(path: Path, language: str) -> list[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    blocks = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(f"{path.name}:{text.count(chr(10), 0, block.start()) + 1}", block[1]) for block in blocks]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_code_in_the_documents_parses(path: Path) -> None:
    for place, code in code_blocks(path, "python"):
        compile(code, place, "exec")
    for place, text in code_blocks(path, "toml"):
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            pytest.fail(f"{place}: {error}")


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_files_of_ours_that_the_documents_name_exist(path: Path) -> None:
    """`plan/rules/table.py`, from src/meshwright or from the root."""
    named = re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|csv|toml|proto))`", path.read_text(encoding="utf-8"))
    yours = {"vision/net.py"}  # a user's own, in docs/models.md
    assert [
        name for name in named if name not in yours and not ((SOURCE / name).exists() or (ROOT / name).exists())
    ] == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_in_the_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []
