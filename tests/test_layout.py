"""The architecture, held by reading the sources: layers, homes of imports, names, programs; and that the programs start."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Who may import whom: only what stands lower. Parts of layers 2 and 3 do not import one another either, but for the one exception.
LAYERS = {
    "personmae_kernels": 0,
    **dict.fromkeys(["configs", "whole_files"], 1),
    **dict.fromkeys(["models", "data", "evaluation"], 2),
    **dict.fromkeys(["training", "visuals", "interop"], 3),
    **dict.fromkeys(["recipes", "extraction", "search_server"], 4),
    **dict.fromkeys(["pretrain", "demo", "tasks"], 5),
    **dict.fromkeys(["cli", "__main__"], 6),
}
SIBLINGS_APART = {2, 3}
MAY_IMPORT_A_SIBLING = {("evaluation", "data")}

# The one home of each third-party import in personmae/ and kernels/: a file, or a folder with all below it. torch and numpy are at home anywhere.
ANYWHERE = {"torch", "numpy"}
HOMES = {
    "nvidia": ["personmae/data/loader_dali.py"],
    "xformers": ["personmae/models/attention.py", "personmae/models/packed_attention.py"],
    "faiss": ["personmae/evaluation/neighbours.py", "personmae/evaluation/gallery_index.py"],
    "sklearn": ["personmae/evaluation/clustering.py"],
    "scipy": ["personmae/data/reid/matlab.py", "personmae/evaluation/"],
    "matplotlib": ["personmae/visuals/"],
    "triton": ["kernels/"],
    "apex": ["personmae/training/optimisers.py"],
    "timm": ["personmae/models/", "personmae/interop/", "personmae/training/finetuning_optimisers.py"],
    "safetensors": ["personmae/models/", "personmae/interop/weight_files.py", "personmae/interop/exports.py"],
    "cv2": ["personmae/data/"],
    "simplejpeg": ["personmae/data/"],
    "PIL": ["personmae/data/", "personmae/visuals/"],
    "fsspec": ["personmae/data/remote.py"],
    "onnx": ["personmae/interop/onnx_files.py"],
    "onnxruntime": ["personmae/interop/onnx_files.py"],
    "fastreid": ["personmae/interop/fast_reid.py"],
    "lmdb": ["personmae/data/packs/lmdb_source.py", "personmae/data/reid/luperson.py"],
    "tqdm": ["personmae/data/", "personmae/evaluation/progress.py", "personmae/training/"],
    "tyro": ["personmae/configs.py", "personmae/recipes/", "personmae/tasks/", "personmae/cli.py"],
}
# These may be missing, so nothing imports them before they are used.
OPTIONAL = ["nvidia.dali", "xformers", "faiss", "apex", "lmdb", "fsspec", "onnx", "onnxruntime", "fastreid", "personmae_kernels._C"]

# `torchrun personmae/pretrain.py` puts personmae/ first on the path, and a benchmark's run benchmarks/: a file there must not hide these.
TAKEN = set(sys.stdlib_module_names) | {
    *HOMES,
    *ANYWHERE,
    *("kernels", "datasets", "evaluate", "adapters", "transformers", "accelerate", "torchvision", "scipy", "tensorboard", "pytest"),
    *("fastreid", "torchreid", "onnx", "onnxruntime", "tensorrt", "mslk", "liger_kernel", "flash_attn"),
}
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper", "base"}
# Files of more than 400 lines, and why each is not two.
LONG: dict[str, str] = {}


def sources(*folders: str) -> list[Path]:
    """The Python files below the folders, relative to the root."""
    found = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


PACKAGES = sources("personmae", "kernels")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too; `from a.b import c` counts as a.b.c."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def part_of_module(dotted: str) -> str | None:
    """The part of the architecture that a module belongs to; None for other packages and for personmae itself."""
    names = dotted.split(".")
    if names[0] == "personmae_kernels":
        return names[0]
    return names[1] if names[0] == "personmae" and len(names) > 1 else None


def module_of(path: Path) -> str:
    names = path.with_suffix("").parts
    names = names[1:] if names[0] == "kernels" else names
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def test_every_part_has_a_layer():
    parts = {part for path in PACKAGES if (part := part_of_module(module_of(path)))}
    assert parts - set(LAYERS) == set()


def test_imports_point_down():
    wrong = []
    for path in PACKAGES:
        here = part_of_module(module_of(path))
        for line, name in imports(path):
            there = part_of_module(name)
            if there not in LAYERS or here == there:
                continue
            # personmae/__init__.py belongs to no layer: it must be empty of the others, or importing anything would import everything.
            layer = LAYERS.get(here or "", -1)
            upward = LAYERS[there] > layer
            sideward = LAYERS[there] == layer and layer in SIBLINGS_APART and (here, there) not in MAY_IMPORT_A_SIBLING
            if upward or sideward:
                wrong.append(f"{path}:{line}: {here} imports {there}")
    assert wrong == []


def test_each_third_party_import_has_one_home():
    wrong = []
    for path in PACKAGES:
        for line, name in imports(path):
            package = name.split(".")[0]
            if package in sys.stdlib_module_names or package in ANYWHERE or package in ("personmae", "personmae_kernels"):
                continue
            if not any(path.as_posix().startswith(home) for home in HOMES.get(package, [])):
                wrong.append(f"{path}:{line}: {package} belongs in {HOMES.get(package, 'no file yet: give it a home in this test')}")
    assert wrong == []


def test_no_relative_import():
    nodes = ((path, node) for path in [*PACKAGES, *sources("benchmarks", "tests")] for node in ast.walk(parse(path)))
    assert [f"{path}:{node.lineno}" for path, node in nodes if isinstance(node, ast.ImportFrom) and node.level] == []


def is_broad(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds)


def test_no_broad_except():
    nodes = ((path, node) for path in [*PACKAGES, *sources("benchmarks"), Path("setup.py")] for node in ast.walk(parse(path)))
    assert [f"{path}:{node.lineno}" for path, node in nodes if isinstance(node, ast.ExceptHandler) and is_broad(node)] == []


def test_kernels_is_no_package():
    """A kernels/__init__.py would hide Hugging Face's package of that name, and a benchmarks/kernels.py too."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.suffix == "" and path.name != "__pycache__"] == [
        "personmae_kernels"
    ]


def test_no_file_hides_another_package():
    beside_programs = [path for folder in ("personmae", "benchmarks") for path in (ROOT / folder).glob("*")]
    assert [path.name for path in beside_programs if path.stem in TAKEN and path.suffix in (".py", "")] == []


def test_programs_define_functions_only():
    """A class in a file that is run would exist twice: as __main__.X and as personmae.<file>.X."""
    programs = [path for path in PACKAGES if LAYERS.get(part_of_module(module_of(path)) or "") == 5]
    assert Path("personmae/pretrain.py") in programs
    assert [f"{path}:{node.lineno}" for path in programs for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)] == []


def test_names_say_something():
    named = {part for path in [*PACKAGES, *sources("benchmarks", "tests")] for part in path.with_suffix("").parts}
    assert named & VAGUE == set()


def test_every_file_says_its_job_first():
    files = [path for path in [*PACKAGES, *sources("benchmarks")] if (ROOT / path).read_text(encoding="utf-8").strip()]
    assert [str(path) for path in files if not ast.get_docstring(parse(path))] == []


def test_files_are_short():
    lengths = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in [*PACKAGES, *sources("benchmarks")]}
    assert {path: length for path, length in lengths.items() if length > 400 and path not in LONG} == {}


def test_test_files_have_different_names():
    """pytest imports them by their base name."""
    names = [path.name for path in sources("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def readme_tree() -> list[tuple[Path, str]]:
    """(path, line) for the lines of the README's file tree: the code block that begins folders with a line `personmae/ ...`.

    A line is `name  what it is`, indented under its folder, whose name ends in a slash.
    """
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    trees = [block for block in blocks if re.search(r"^\s*personmae/", block, re.MULTILINE)]
    assert len(trees) == 1, "the README has one file tree, a code block with a line that begins with personmae/"
    entries, folders = [], [(-1, Path())]
    for line in trees[0].splitlines():
        if not line.strip():
            continue
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders[-1][0] >= indent:
            folders.pop()
        path = folders[-1][1] / name
        entries.append((path, line))
        if name.endswith("/"):
            folders.append((indent, path))
    return entries


def test_the_file_tree_of_the_readme_is_true():
    entries = readme_tree()
    assert [str(path) for path, _ in entries if not (ROOT / path).exists()] == []
    words = set(re.findall(r"\w+", "\n".join(line for _, line in entries)))
    modules = [path for path in [*PACKAGES, *sources("benchmarks")] if path.stem != "__init__"]
    assert [str(path) for path in modules if path.stem not in words] == []


def pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def test_both_stacks_pin_what_they_share_alike():
    default, second = pins("constraints.txt"), pins("constraints-torch211.txt")
    different = {name for name in default.keys() & second.keys() if default[name] != second[name]}
    assert different == {"torch", "torchvision", "cuda-bindings"}


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    always = {re.split(r"[<>=\[]", line)[0] for line in [*project["dependencies"], *extras["dev"]]}
    optional = {re.split(r"[<>=\[]", line)[0] for name in ("dali", "xformers", "faiss") for line in extras[name]}
    assert always | optional <= set(pins("constraints.txt"))
    assert always <= set(pins("constraints-torch211.txt"))


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the root as a user would; PYTHONSAFEPATH is taken over from this run."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("program", [["personmae/pretrain.py"], ["personmae/tasks/uda.py"], ["-m", "personmae"]], ids=" ".join)
def test_programs_start(program):
    result = start(*program, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_importing_every_module_does_nothing():
    """No optional package is imported, no CUDA context made, nothing printed."""
    modules = [module_of(path) for path in PACKAGES if path.stem != "__main__"]
    check = [
        "import importlib, sys, torch",
        f"for name in {modules}: importlib.import_module(name)",
        f"early = [name for name in {OPTIONAL} if name in sys.modules]",
        "assert not early, f'imported before they are used: {early}'",
        "assert not torch.cuda.is_initialized()",
    ]
    result = start("-c", "\n".join(check))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
