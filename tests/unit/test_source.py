"""The preparation of C, C++ and Java: what becomes of a text, and that no text takes long."""

from __future__ import annotations

import random
import re
import time

import pytest

from pbotvm_qemu.guest.source import build, c, java, outline, tokens
from pbotvm_qemu.guest.source.outline import BLOCK, DECLARATION, FUNCTION, STATEMENT, TYPE

C = c.Options(cpp=False, file="prog.c", headers=("stdio.h", "stdlib.h"), defines=("_XOPEN_SOURCE 9001",))
CPP = c.Options(cpp=True, file="prog.cpp", headers=("iostream",), defines=())


def kinds(text: str, *, cpp: bool = False) -> list[int]:
    return [piece.kind for piece in outline.pieces(tokens.Tokens(text), cpp=cpp)]


def code(prepared: c.Prepared) -> str:
    """Return the program without line marks, on one line."""
    return " ".join(re.sub(r"^#line .*$", "", prepared.text, flags=re.MULTILINE).split())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int f(void) { return 1; }", [FUNCTION]),
        ("main() { }", [FUNCTION]),
        ("int (*f(int a))(int) { }", [FUNCTION]),
        ("int (f)(int a) { }", [FUNCTION]),
        ("int f(a, b) int a; double b; { }", [FUNCTION]),
        ("int f(p, q) int (*p)(int); int q; { }", [FUNCTION]),
        ("__attribute__((noinline)) int f(void) { }", [FUNCTION]),
        ("struct s f(void) { }", [FUNCTION]),
        ("int f(void) <% return 1; %>", [FUNCTION]),
        ("int f(void);", [DECLARATION]),
        ("int a = 3, b[] = { 1, 2 };", [DECLARATION]),
        ("struct s { int x; };", [TYPE]),
        ("struct s { int x; } v = { 1 };", [DECLARATION]),
        ("typedef struct { int x; } s;", [DECLARATION]),
        ("enum { A, B } e;", [DECLARATION]),
        ("a = (struct s){ 1 };", [STATEMENT]),
        ("if (x) { f(); } else { g(); }", [STATEMENT]),
        ("do { f(); } while (x);", [STATEMENT]),
        ("for (;;) { } f();", [STATEMENT, STATEMENT]),
        ("f();", [STATEMENT]),
        ("*p = 1; ++x; x++; a[1] = 2; p->x = 3; x += 1;", [STATEMENT] * 6),
        ("{ f(); }", [STATEMENT]),
        ("size_t n; FILE *f;", [DECLARATION, DECLARATION]),
    ],
)
def test_c_is_taken_apart(text: str, found: list[int]) -> None:
    assert kinds(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("template <typename T = std::vector<int>> T f(T x) { return x; }", [FUNCTION]),
        ("struct A { int x; A(int y) : x{y} { } };", [TYPE]),
        ("A::A(int y) : x{y}, z(3) { }", [FUNCTION]),
        ("int A::get() const noexcept { return x; }", [FUNCTION]),
        ("auto f() -> int { return 1; }", [FUNCTION]),
        ("bool operator==(A a, A b) { return true; }", [FUNCTION]),
        ("A operator()(int x) { }", [FUNCTION]),
        ("namespace n { int x; } int y;", [BLOCK, DECLARATION]),
        ('extern "C" { int f(void); }', [BLOCK]),
        ("using namespace std;", [DECLARATION]),
        ("auto f = [](int x) { return x; };", [DECLARATION]),
        ("std::vector<int> v{1, 2};", [DECLARATION]),
        ("std::vector<int> v(3), w{1};", [DECLARATION]),
        ("std::cout << 1;", [STATEMENT]),
        ("try { f(); } catch (...) { }", [STATEMENT]),
        ("int f() try { return 1; } catch (...) { return 2; }", [FUNCTION]),
    ],
)
def test_cpp_is_taken_apart(text: str, found: list[int]) -> None:
    assert kinds(text, cpp=True) == found


def test_statements_outside_of_functions_go_into_a_main_and_declarations_stay() -> None:
    said = code(c.prepare("int k = 1; k++; int f(void) { return k; } int j = f(); j;", C))
    before, _, inside = said.partition("int main(int argc, char *argv[]) {")
    assert "int k = 1;" in before
    assert "k++;" not in before
    assert inside.index("k++;") < inside.index("int j = f();")


def test_headers_come_only_to_a_text_without_any() -> None:
    assert "#include <stdio.h>" in c.prepare("puts(0);", C).text
    own = c.prepare('#include "mine.h"\nputs(0);', C).text
    assert "stdio.h" not in own
    assert "_XOPEN_SOURCE" not in own
    assert own.index("mine.h") < own.index("prelude.h")
    assert "include" not in c.prepare("puts(0); -noheaders", C).text


def test_our_header_stands_outside_of_conditions() -> None:
    text = c.prepare("#define _GNU_SOURCE\n#ifdef X\n#include <a.h>\n#endif\nint main(void) { }", C).text
    assert text.index("#endif") < text.index("prelude.h") < text.index("int main")


def test_every_statement_has_a_place_of_its_own() -> None:
    prepared = c.prepare("void f(int n) { char *p = 0; p[n] = 1; }\nint k = 3; f(k);", C)
    assert prepared.statements["1:1"] == "char *p = 0;"
    assert prepared.statements["2:1"] == "p[n] = 1;"
    assert prepared.statements["0:2"] == "int k = 3;"
    assert prepared.statements["1:2"] == "f(k);"
    for key in ("1:1", "2:1", "1:2"):
        part, line = key.split(":")
        assert f'#line {line} "{part}/prog.c"' in prepared.text


def test_where_a_function_begins_is_no_statement() -> None:
    assert c.prepare("int f(int n) { return f(n + 1); } f(0)", C).statements == {
        "0:1": "", "1:1": "return f(n + 1);", "2:1": "}", "3:1": "f(0);"
    }  # fmt: skip


def test_columns_are_the_callers() -> None:
    lines = c.prepare("int a; int bb; int ccc;", C).text.split("\n")
    assert lines[lines.index('#line 1 "1/prog.c"') + 1].index("int bb") == 7
    assert lines[lines.index('#line 1 "2/prog.c"') + 1].index("int ccc") == 15


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("2 + 2", True), ("f(x)", True), ("sizeof (char)", True), ("a", True), ("a == b;", True), ("++a + b;", True),
        ("x = 3", False), ("x ^= 3", False), ("int x", False), ("FILE *f", False), ("printf(x)", False), ("return 2", False),
        ("if (x) y;", False), ("{ x; }", False), ("", False), ("size_t n", False), ("puts(0)", False), ('"text"', True),
    ],
)  # fmt: skip
def test_the_last_statement_is_shown_when_it_has_a_value(text: str, last: bool) -> None:
    assert c.prepare(f"int b; {text}", C).last is last


@pytest.mark.parametrize(
    ("text", "debugger"),
    [
        ("int a; print(a);", True), ('gdb("info");', True), ("if (1) watch(a);", True), ("printf(0);", False),
        ("void print(int x) { } print(3);", False), ("o.print(3);", False), ('puts("print(a)");', False), ("// print(a)", False),
    ],
)  # fmt: skip
def test_the_debugger_is_used_for_its_commands_only(text: str, debugger: bool) -> None:
    assert c.prepare(text, C).debugger is debugger


def test_a_name_of_ours_that_the_program_uses_is_given_back() -> None:
    assert "#undef print\n" in c.prepare("void print(int x) { } print(3);", C).text
    assert "#undef" not in c.prepare("print(3);", C).text


def test_an_unended_directive_is_warned_of() -> None:
    assert "not terminated" in c.prepare("#define X 1 int main(void) { }", C).warning
    assert not c.prepare("#define X 1\\nint main(void) { }", C).warning
    assert not c.prepare("#include <a.h> int main(void) { }", C).warning


def test_newlines_of_a_chat() -> None:
    assert tokens.expand_newlines(r"#define A 1\n puts(\"a\nb\"); // c\nx".replace('\\"', '"')) == (
        '#define A 1\n puts("a\\nb"); // c\nx'
    )
    several = 'a; // prints \\n\nb; "\\n"'
    assert tokens.expand_newlines(several) == several


NONSENSE = [
    '"', "/*", 'R"(', "??", "\\", "\\n", "{", "}", "(", ")", "()", "{}", "a ", "a(b)c;", "# ", "#if\n", "#include <", ";", "a;",
    "a;\n", "f(){}", "f(a) int a;", "if(x){}else ", "if(x)y;else ", "{;", "template<", "a<", "::", "=", "x=", "[", "operator",
    "struct{", "(a", "-include x ", "-nomain ", "void f(int x){", "class A{", "@", "print(x);", '"""', "\n", "\\\n", "*", "'", "int a,",
]  # fmt: skip


@pytest.mark.parametrize("piece", NONSENSE, ids=repr)
@pytest.mark.parametrize("kind", ["c", "c++", "java"])
def test_time_and_size_grow_with_the_text_only(kind: str, piece: str) -> None:
    def seconds(size: int) -> tuple[float, int]:
        text = (piece * (size // len(piece) + 1))[:size]
        begin = time.process_time()
        if kind == "java":
            made = java.prepare(text, "prog.java", ("java.util.*",), ()).text
        else:
            made = c.prepare(text, CPP if kind == "c++" else C).text
        return time.process_time() - begin, len(made)

    small, _ = seconds(1 << 10)
    large, size = seconds(1 << 14)
    # A square would be 256 times; noise of a busy host is a few times.
    assert large < 80 * max(small, 0.002)
    assert size < 64 * (1 << 14)


def test_more_than_a_megabyte_is_compiled_as_it_stands() -> None:
    text = "int x;\n" * 200_000
    assert c.prepare(text, C).text == text
    assert java.prepare(text, "prog.java", (), ()).text == text


def test_random_texts_never_fail_and_lose_no_token() -> None:
    random_ = random.Random(7)
    words = [
        "int",
        "main",
        "(",
        ")",
        "{",
        "}",
        ";",
        ",",
        "#define X 1\n",
        '"s"',
        "'c'",
        "/* c */",
        "// l\n",
        "x",
        "=",
        "1",
        "if",
        "\n",
        "struct",
        "[",
        "]",
        ":",
    ]
    for _ in range(300):
        text = " ".join(random_.choice(words) for _ in range(random_.randrange(1, 60)))
        for options in (C, CPP):
            made = c.prepare(text, options)
            wanted = tokens.Tokens(text)
            have = re.findall(r"\w+", made.text)
            for index in range(len(wanted)):
                assert wanted[index] in made.text
            assert "main" in have


@pytest.mark.parametrize(
    ("text", "main", "inside"),
    [
        ('System.out.println("hi");', "prog", "main(String[] args)"),
        ('System.out.println("hi")', "prog", '("hi");'),
        ("class A { public static void main(String[] a) { } }", "A", "class A"),
        ("int sq(int x) { return x * x; } System.out.println(sq(3));", "prog", "static int sq"),
        ("static int sq(int x) { return x * x; } System.out.println(sq(3));", "prog", "{ static int sq"),
        ("record P(int x) { } System.out.println(new P(3));", "prog", "static record P"),
        ("import java.io.*; System.out.println(1);", "prog", "import java.io.*; public class prog"),
        ("public static void main(String[] a) { } static int x = 3;", "prog", "static int x"),
        ("static int n = 5; System.out.println(n);", "prog", "static int n = 5; public static void main"),
        ("List<Integer> l = List.of(1, 2); for (int i : l) { System.out.println(i); }", "prog", "import java.util.*;"),
        ("interface I { } class B implements I { static void main(String[] a) { } }", "B", "interface I"),
    ],
)  # fmt: skip
def test_java_gets_a_class_and_a_main(text: str, main: str, inside: str) -> None:
    prepared = java.prepare(text, "prog.java", ("java.util.*",), ())
    assert prepared.main == main
    assert inside in prepared.text
    assert prepared.text.count("{") == prepared.text.count("}")


def test_java_keeps_its_lines() -> None:
    prepared = java.prepare('\n\nint x = 1;\n\nSystem.out.println("hi");\n', "prog.java", ("java.util.*",), ())
    assert prepared.text.split("\n")[2].endswith("int x = 1; ")
    assert "println" in prepared.text.split("\n")[4]
    public = java.prepare("public class Mine { }", "prog.java", (), ())
    assert (public.file, public.main) == ("Mine.java", "Mine")


def test_what_a_compiler_says_is_told_as_the_caller_knows_it() -> None:
    said = [
        "prog.c: In function 'main':",
        "2/prog.c:1:9: warning: unused variable 'b'",
        "pbotvm-2/prog.c:1:9: warning: unused variable 'b'",
        "pbotvm/prog.c:3:1: note: here",
        "prog.c: In function 'f':",
    ]
    assert build._own_lines(said, "prog.c") == [said[0], "prog.c:1:9: warning: unused variable 'b'"]


def test_in_a_chat_places_and_noise_are_left_out() -> None:
    said = [
        "prog.c: In function \N{LEFT SINGLE QUOTATION MARK}main\N{RIGHT SINGLE QUOTATION MARK}:",
        "prog.c:1:5: warning: division by zero [-Wdiv-by-zero]",
        "prog.c:1:8: warning: ISO C17 does not support the \N{LEFT SINGLE QUOTATION MARK}%b\N{RIGHT SINGLE QUOTATION MARK} gnu_printf format",
        "compilation terminated due to -Wfatal-errors.",
        "1 warning generated.",
    ]
    assert build._for_chat(said, "prog.c") == [
        "warning: division by zero [-Wdiv-by-zero]",
        "note: %b is a candide extension",
    ]
