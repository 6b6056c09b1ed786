"""The shape of the file: what the docstring of the module promises about it."""

import ast
import functools
import re
import subprocess
import symtable
import sys

import pytest

import tinyreg
from conftest import TINYREG, found_pythons

with open(TINYREG, encoding="utf-8") as file:
    SOURCE = file.read()
LINES = SOURCE.splitlines()
MODULE = ast.parse(SOURCE)
PYTHONS = found_pythons()

# What a room must not touch, by the modules that it would take.
DISK = {"os", "shutil", "fcntl", "mmap", "tempfile", "glob", "open"}
SOCKETS = {"socket", "selectors", "socketserver"}
CLOCK = {"time", "datetime"}
NEVER = {"Errors": (DISK - {"os"}) | SOCKETS, "Values": DISK | SOCKETS | CLOCK,
         "Directory": SOCKETS | {"http", "urllib"},
         "Access": SOCKETS, "API": SOCKETS | {"shutil", "fcntl"}, "Page": SOCKETS | {"shutil", "fcntl"}}


@functools.lru_cache()
def rooms():
    """[(first line, number, name)] of the banners."""
    return [(place, int(match.group(1)), match.group(2)) for place, match in
            ((place, re.fullmatch(r"# (\d+)  (\w+)", line)) for place, line in enumerate(LINES, 1)) if match]


def room_of(line):
    """The number of the room that a line is in; 0 above the first."""
    return max([number for first, number, _ in rooms() if first <= line], default=0)


@functools.lru_cache()
def definitions():
    """{name: line} of what the module defines at its top level, imports excepted."""
    found = {}
    for statement in MODULE.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(statement.name, statement.lineno)
        elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.setdefault(node.id, node.lineno)
    return found


@functools.lru_cache()
def uses():
    """{(name, line of the function or class)} for each global name that a scope below the top level refers to."""
    found = set()
    tables = symtable.symtable(SOURCE, TINYREG, "exec").get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                found.add((symbol.get_name(), table.get_lineno()))
    return found


def test_rooms_stand_in_their_order():
    numbers = [number for _, number, _ in rooms()]
    assert numbers == sorted(set(numbers)) and len(numbers) > 10


def test_the_docstring_names_the_rooms():
    for _, number, name in rooms():
        assert re.search(r"\b%d %s\b" % (number, name), tinyreg.__doc__), name


def test_each_room_says_what_it_owns():
    starts = [first for first, _, _ in rooms()] + [len(LINES)]
    for (first, _, name), end in zip(rooms(), starts[1:]):
        body = [line for line in LINES[first:end - 2] if line.strip()]
        if any(not line.startswith("#") for line in body):
            assert len([line for line in body[:6] if re.match("# [A-Z`a-z]", line)]) >= 1, name


def test_calls_go_up_the_page():
    defined = definitions()
    wrong = {"%s (room %d) is used in room %d, line %d" % (name, room_of(defined[name]), room_of(line), line)
             for name, line in uses() if name in defined and room_of(defined[name]) > room_of(line)}
    assert wrong == set()


def test_the_check_of_calls_sees_a_call_down_the_page():
    assert any(name == "dispatch" and room_of(line) > room_of(definitions()["dispatch"]) for name, line in uses())
    assert room_of(definitions()["parse_digest"]) < room_of(definitions()["dispatch"]) < room_of(definitions()["main"])


@pytest.mark.parametrize("room", sorted(NEVER))
def test_what_a_room_never_touches(room):
    number = next(number for _, number, name in rooms() if name == room)
    touched = {name for name, line in uses() if room_of(line) == number}
    assert touched & NEVER[room] == set()


def test_only_the_standard_library_is_imported():
    imported = set()
    for node in ast.walk(MODULE):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported, "the check must see something"
    if hasattr(sys, "stdlib_module_names"):
        assert imported - set(sys.stdlib_module_names) == set()


def test_imports_stand_one_a_line_in_their_order():
    names = re.findall(r"^import (.+)$", SOURCE, re.MULTILINE)
    assert names == sorted(names) and not any("," in name for name in names)


@pytest.mark.parametrize("python", sorted(PYTHONS), ids=lambda version: "%d.%d" % version)
def test_it_runs_alone(tmp_path, python):
    """A copy of the one file, without installed packages and the folder around it, and no warning from the compiler."""
    copy = tmp_path / "copy.py"
    copy.write_text(SOURCE, encoding="utf-8")
    done = subprocess.run([PYTHONS[python], "-I", "-S", "-W", "error", str(copy), "--version"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=str(tmp_path), universal_newlines=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tinyreg %s\n" % tinyreg.__version__, "")


def test_the_grammar_is_that_of_3_6():
    ast.parse(SOURCE, feature_version=(3, 6))
    found = [node.lineno for node in ast.walk(MODULE) if isinstance(node, getattr(ast, "NamedExpr", ()))]
    assert found == []
    assert not re.search(r"""\bf["'][^"']*\{[^}"']*=\}""", SOURCE), 'f"{name=}" needs 3.8'


def test_helpers_stand_before_their_callers():
    """But for classes that make each other's objects."""
    places = {node.name: node.lineno for node in MODULE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    functions = {node.name for node in MODULE.body if isinstance(node, ast.FunctionDef)}
    for node in MODULE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            own = {part.id for part in names if isinstance(part.ctx, ast.Store)}
            own |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
            late = {part.id for part in names if places.get(part.id, 0) > node.lineno} - own
            assert not late & functions and (not late or isinstance(node, ast.ClassDef)), (node.name, late)


def test_one_place_prints_what_strangers_say():
    """Else an escape sequence in an image reaches the terminal; half a character ends the command."""
    printers = {"tell", "complain", "tell_progress"}
    for node in MODULE.body:
        for part in ast.walk(node):
            used = ast.unparse(part) if isinstance(part, (ast.Name, ast.Attribute)) else ""
            prints = used in ("print", "sys.stdout.write", "sys.stderr.write")
            assert not prints or getattr(node, "name", "") in printers, "line %d prints" % part.lineno
    assert {node.name for node in MODULE.body if isinstance(node, ast.FunctionDef)} >= printers
