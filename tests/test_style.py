"""Checks that the linter lacks: the length of functions, the syntax of the page's script."""

import ast
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

LONGEST = 45  # lines of a function, its docstring included
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")])


def functions(source):
    """Yields the name and the number of lines of each function, without decorators."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_fits_on_a_screen(path):
    found = functions(path.read_text(encoding="utf-8"))
    assert [(name, count) for name, count in found if count > LONGEST] == []


def test_lines_of_nested_functions_count_for_the_outer_one():
    source = "@cache\ndef outer():\n    def inner():\n        pass\n\n    return inner\n"
    assert dict(functions(source)) == {"outer": 5, "inner": 2}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_the_page_is_javascript(tmp_path):
    """`node --check` does not run the script. The script contains no placeholder."""
    source = (ROOT / "detect_mislabeled_dataset.py").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    path = tmp_path / "page.js"
    path.write_text(script, encoding="utf-8")
    checked = subprocess.run(["node", "--check", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
