"""The shape of the file: what the docstring of the module promises about it."""

import ast
import bisect
import builtins
import collections
import functools
import io
import re
import subprocess
import symtable
import sys
import tokenize
import types
import typing

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


# Rules of style. Each takes a Page and gives a Place for whatever breaks it.

class Place(typing.NamedTuple):
    room: str
    text: str
    line: int


class Page:
    """Python source as the rules look at it: lines, syntax, comments, and rooms by their banners."""

    def __init__(self, source):
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        self.nodes = sorted(ast.walk(self.tree), key=lambda node: getattr(node, "lineno", 0))
        self.banners = [(number, match.group(2)) for number, line in enumerate(self.lines, 1)
                        for match in [re.fullmatch(r"# (\d+)  (\w+)", line)] if match]
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}

    def room(self, node):
        """The place in the order of rooms that a node is in; 0 above the first."""
        return bisect.bisect(self.banners, (node.lineno, chr(sys.maxunicode)))

    def place(self, node, text):
        rooms = ["the top"] + [name for _, name in self.banners]
        return Place(rooms[self.room(node)], text, node.lineno)

    def walk(self, *types):
        return [node for node in self.nodes if isinstance(node, types)]

    def classes(self):
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef)]

    def definitions(self):
        """{name: the rooms that define it} of functions, classes, methods, globals and attributes of objects."""
        places = collections.defaultdict(set)
        for node in self.walk(*FUNCTIONS, ast.ClassDef):
            places[node.name].add(self.room(node))
        for parent in [self.tree] + self.walk(ast.ClassDef):
            for node in [part for child in parent.body if not isinstance(child, FUNCTIONS + (ast.ClassDef,))
                         for part in ast.walk(child)]:
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    places[node.id].add(self.room(node))
        for node in self.walk(ast.Attribute):
            if isinstance(node.ctx, ast.Store) and is_self(node.value):
                places[node.attr].add(self.room(node))
        for node in self.walk(ast.Call):
            if ast.unparse(node.func).endswith("namedtuple"):
                for name in re.findall(r"\w+", ast.unparse(node.args[1])):
                    places[name].add(self.room(node))
        return places

    def uses(self):
        """[(name, node)] of names and attributes, wherever they are read or written."""
        names = [(node.id, node) for node in self.walk(ast.Name)]
        return names + [(node.attr, node) for node in self.walk(ast.Attribute)]


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BROAD = {"BaseException", "Exception", "RegistryError"}


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


@functools.lru_cache()
def names_of_the_standard_library():
    """Attributes that objects of Python itself and of the modules that tinyreg.py imports have."""
    tops = {name for name, module in vars(tinyreg).items() if isinstance(module, types.ModuleType)}
    names = set()
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] in tops] + [builtins]:
        names.update(dir(module))
        for thing in vars(module).values():
            names.update(dir(thing))
    return names


def private_names_of_other_rooms(page):
    """No room uses what another calls `_private`."""
    places = page.definitions()
    return [page.place(node, name) for name, node in page.uses()
            if is_private(name) and name in places and page.room(node) not in places[name]]


def strings_that_name_functions_of_other_rooms(page):
    """A string is no way to call a function or to speak of one. (A name of one word may be a word.)"""
    places = collections.defaultdict(set)
    for node in page.walk(*FUNCTIONS):
        places[node.name].add(page.room(node))
    return [page.place(node, repr(node.value)) for node in page.walk(ast.Constant)
            if isinstance(node.value, str) and "_" in node.value.strip("_")
            and node.value in places and page.room(node) not in places[node.value]]


def uses_of_rooms_below(page):
    """Calls go up the page: also those of methods, and what is read of objects. (Globals: see above.)"""
    places = page.definitions()
    return [page.place(node, node.attr) for node in page.walk(ast.Attribute)
            if node.attr in places and node.attr not in names_of_the_standard_library()
            and page.room(node) < min(places[node.attr])]


def untyped_public_functions(page):
    """Functions that another room uses, and methods of classes, say the types of all they take and give."""
    used = collections.defaultdict(set)
    for name, node in page.uses():
        used[name].add(page.room(node))
    functions = [(node.name, node) for node in page.tree.body if isinstance(node, FUNCTIONS)
                 and used[node.name] - {page.room(node)}]
    functions += [("%s.%s" % (parent.name, node.name), node) for parent in page.classes() if parent.name[0] != "_"
                  for node in parent.body if isinstance(node, FUNCTIONS)]
    wrong = []
    for name, node in functions:
        takes = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        takes += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        untyped = [one.arg for one in takes if not one.annotation and one.arg not in ("self", "cls")]
        if not node.name.startswith("_") or node.name == "__init__":
            if untyped or (node.returns is None and node.name != "__init__"):
                wrong.append(page.place(node, "%s(%s)" % (name, ", ".join(untyped))))
    return wrong


def long_lines(page):
    """A line has at most 100 columns."""
    numbers = [number for number, line in enumerate(page.lines, 1) if len(line) > 100]
    return [page.place(ast.Pass(lineno=number), "%d columns" % len(page.lines[number - 1])) for number in numbers]


def long_functions(page):
    """A function has at most 50 lines, with its docstring."""
    return [page.place(node, node.name) for node in page.walk(*FUNCTIONS) if node.end_lineno - node.lineno >= 50]


def names_that_say_nothing(page):
    """A name says what a thing is."""
    return [page.place(node, name) for name, node in page.uses() + [(node.arg, node) for node in page.walk(ast.arg)]
            if name == "found"]


def errors_passed_over_in_silence(page):
    """A comment says why an error may pass: at each suppress(), and where a broad class is caught."""
    blocks = [(node, node.body) for node in page.walk(ast.With) if "suppress(" in ast.unparse(node.items[0])]
    for node in page.walk(ast.ExceptHandler):
        classes = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if {getattr(one, "id", "Exception") for one in classes} & BROAD:
            blocks.append((node, node.body))
    explained = [range(node.lineno - (node.lineno - 1 in page.comments
                                      and page.lines[node.lineno - 2].lstrip().startswith("#")),
                       body[0].lineno + 1) for node, body in blocks]
    return [page.place(node, page.lines[node.lineno - 1].strip())
            for (node, _), lines in zip(blocks, explained) if not page.comments.intersection(lines)]


RULES = [private_names_of_other_rooms, strings_that_name_functions_of_other_rooms, uses_of_rooms_below,
         untyped_public_functions, long_lines, long_functions, names_that_say_nothing,
         errors_passed_over_in_silence]


@functools.lru_cache()
def page():
    return Page(SOURCE)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_style(rule):
    assert rule(page()) == []


SAMPLE = '''
# 1  Values

def parse_name(text: str) -> str:
    found = text
    try:
        return found
    except Exception:
        return ""


class Name:
    def __init__(self, text):
        self._text = text

    def lower_case(self) -> str:
        return "parse_name" + self._text


def push(store):
    store.put_name()
    try:
        return store
    except (KeyError, RegistryError):  # nothing to push
        pass


# 2  Store

class Store:
    def put_name(self) -> None:
        parse_name("lower_case")
        Name("x")._text = push(self)
        with suppress(OSError):
            _private = %r
        with suppress(KeyError):
            # It is a comment that says why.
            pass
        # As does this.
        with suppress(KeyError): pass

    def long(self) -> None:
%s
''' % ("x" * 80, "        pass\n" * 50)


@pytest.mark.parametrize("rule, places", [
    (private_names_of_other_rooms, [("Store", "_text", 33)]),
    (strings_that_name_functions_of_other_rooms, [("Store", "'lower_case'", 32)]),
    (uses_of_rooms_below, [("Values", "put_name", 21)]),
    (untyped_public_functions, [("Values", "Name.__init__(text)", 13), ("Values", "push(store)", 20)]),
    (long_lines, [("Store", "105 columns", 35)]),
    (long_functions, [("Store", "long", 42)]),
    (names_that_say_nothing, [("Values", "found", 5), ("Values", "found", 7)]),
    (errors_passed_over_in_silence, [("Values", "except Exception:", 8),
                                     ("Store", "with suppress(OSError):", 34)]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_rule_of_style_sees_what_breaks_it(rule, places):
    assert sorted(rule(Page(SAMPLE)), key=lambda place: place.line) == places
