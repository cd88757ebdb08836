"""Interactive editing: what the predecessor documents, and what a stranger may try."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import editing
from pbotvm_qemu.editing import Editor, Reply
from pbotvm_qemu.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

USAGE = "Usage: cc ..."


class Chat:
    """One channel in one language."""

    def __init__(self, folder: Path, channel: str = "#c", language: str = "sh") -> None:
        self.editor = Editor(folder, usage=USAGE)
        self._channel = channel
        self._language = language

    def run(self, line: str) -> str:
        """Return the code that is run."""
        reply = self.editor.handle(self._channel, self._language, line)
        assert reply.text is None, reply.text
        assert reply.code is not None
        return reply.code

    def said(self, line: str) -> str:
        """Return the text that is shown."""
        reply = self.editor.handle(self._channel, self._language, line)
        assert reply.code is None, reply.code
        assert reply.text is not None
        return reply.text


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(tmp_path / "history")


def test_code_is_run_and_kept(chat: Chat) -> None:
    assert chat.run('-x -args "a b" echo foo bar foo') == '-x -args "a b" echo foo bar foo'
    assert chat.said("show") == '-x -args "a b" echo foo bar foo'
    assert chat.run("run") == '-x -args "a b" echo foo bar foo'
    assert chat.run("again") == '-x -args "a b" echo foo bar foo'


def test_the_worked_example(chat: Chat) -> None:
    first = '-x -args "a b" echo foo bar foo'
    chat.run(first)
    assert chat.run("replace 'foo' with 'baz'") == '-x -args "a b" echo baz bar foo'
    assert chat.said("undo") == first
    chat.run("echo foo BAR foo")
    assert chat.run("s/(B)(A)/$2$1/") == "echo foo ABR foo"
    assert chat.run("append '; echo end'") == "echo foo ABR foo ; echo end"
    chat.run("echo q bar")
    assert chat.run("replace 'q' with 'A' and 'bar' with 'B'") == "echo A B"


@pytest.mark.parametrize(
    ("edit", "after"),
    [
        ("replace all 'foo' with 'x'", "x bar x foobar"),
        ("replace second 'foo' with 'x'", "foo bar x foobar"),
        ("replace last 'foo' with 'x'", "foo bar x foobar"),
        ("replace 'foo bar' with 'x'", "x foo foobar"),
        ("remove 'foo '", "bar foo foobar"),
        ("remove 'bar' and 'foo'", "  foo foobar"),
        ("prepend 'first'", "first foo bar foo foobar"),
        ("append 'a' and 'b'", "foo bar foo foobar a b"),
        ("s/foo/x/g", "x bar x xbar"),
        ("s/FOO/x/gi", "x bar x xbar"),
        ("s/o+/$&$&/", "foooo bar foo foobar"),
        (r"s/ bar/\/x/", "foo/x foo foobar"),
        ("s/foo/x/ and s/bar/y/", "x y foo foobar"),
        ("s/foo/x/ s/bar/y/ and run", "x y foo foobar"),
        (r"replace 'foo' with 'it\'s'", "it's bar foo foobar"),
        ("-O2 replace 'foo' with 'x'", "x bar foo foobar"),
    ],
)
def test_a_change_runs_what_it_makes(chat: Chat, edit: str, after: str) -> None:
    chat.run("foo bar foo foobar")
    assert chat.run(edit) == after
    assert chat.said("show") == after


def test_undo_steps_back_and_changes_from_there(chat: Chat) -> None:
    for code in ("one", "two", "three"):
        chat.run(f"echo {code}")
    assert chat.said("undo") == "echo two"
    assert chat.run("undo and replace 'one' with 'four'") == "echo four"
    assert chat.run("undo run") == "echo one"
    assert chat.said("undo") == "No more undos remaining."


def test_another_buffer_is_copied_and_changed(tmp_path: Path) -> None:
    here, there = Chat(tmp_path, "#here"), Chat(tmp_path, "#there")
    there.run("echo there")
    assert here.said("copy #there") == "echo there"
    assert here.run("copy #there and replace 'there' with 'here'") == "echo here"
    assert here.said("show #there") == "echo there"
    assert here.said("copy #none") == "No history for #none."


def test_buffers_of_languages_are_apart(tmp_path: Path) -> None:
    Chat(tmp_path, language="sh").run("echo 1")
    assert Chat(tmp_path, language="c11").said("show") == "No recent code to show."


def test_differences_are_shown_word_by_word(chat: Chat) -> None:
    assert chat.said("diff") == "Not enough recent code to diff."
    chat.run('printf("Hello, world");')
    chat.run("s/Hello/Bye/ and s/world/void/")
    assert chat.said("diff") == 'printf("`replaced Hello with Bye`, `replaced world with void`");'
    chat.run("append 'x'")
    assert chat.said("diff").endswith("`inserted  x`")


def test_paste_is_told_apart_from_run(chat: Chat) -> None:
    chat.run("echo 1")
    assert chat.editor.handle("#c", "sh", "paste") == Reply(code="echo 1", paste=True)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("show", "No recent code to show."),
        ("run", "No recent code to run."),
        ("append 'x'", "No recent code to append to."),
        ("prepend 'x'", "No recent code to prepend to."),
        ("replace 'a' with 'b'", "No recent code to change."),
        ("s/a/b/", "No recent code to change."),
        ("undo", "No more undos remaining."),
    ],
)
def test_without_code_an_edit_says_so(chat: Chat, edit: str, said: str) -> None:
    assert chat.said(edit) == said


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("replace 'a with 'b", f"Bad replacement: write replace 'from' with 'to'.  {USAGE}"),
        ("remove 'a", f"Unbalanced single quotes.  {USAGE}"),
        ("append 'a", f"Unbalanced single quotes.  {USAGE}"),
        ("s/a", f"Unbalanced slashes.  {USAGE}"),
        ("s/a/b/x", "Bad regex modifier 'x'.  Only 'i' and 'g' are allowed."),
        ("s/(/b/", "Bad regular expression: "),
        ("replace eleventh 'a' with 'b'", "Bad replacement modifier 'eleventh'; valid modifiers are 'all', 'first', "),
        ("replace 'nothing' with 'x'", "No replacements made."),
        ("s/nothing/x/", "No substitutions made."),
        ("replace 'a' with 'b' nonsense", f"Unknown edit 'nonsense'.  {USAGE}"),
    ],
)
def test_a_broken_edit_is_told(chat: Chat, edit: str, said: str) -> None:
    chat.run("echo a")
    assert chat.said(edit).startswith(said)
    assert chat.said("show") == "echo a"


@pytest.mark.parametrize(
    "code",
    [
        "run the tests", "paste a b", "undo this; echo", "show me the money", "replace = 3; print(replace)", "copy a b c",
        "append(x)", "remove x y", "s/ 2", "diff a b c", "again and again", "# and 'x'", "run() { :; }; run",
    ],
)  # fmt: skip
def test_code_that_begins_with_a_keyword_is_code(chat: Chat, code: str) -> None:
    if code.startswith("s/"):
        assert "Unbalanced slashes" in chat.said(code)
    else:
        assert chat.run(code) == code


@pytest.mark.parametrize("channel", ["../../etc/passwd", "/etc/x", "..", ".", "a\0b", "x" * 5000, "", "é/ü", "-rf"])
def test_no_channel_leaves_the_folder(tmp_path: Path, channel: str) -> None:
    folder = tmp_path / "history"
    Chat(folder, channel).run("echo 1")
    assert Chat(folder, channel).said("show") == "echo 1"
    assert [path.parent for path in tmp_path.rglob("*.hist")] == [folder]
    assert Chat(folder).run("copy ../x") == "copy ../x"  # no name of a buffer, and so code


def test_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "ENTRIES_MAX", 5)
    monkeypatch.setattr(editing, "BUFFERS_MAX", 3)
    chat = Chat(tmp_path)
    for number in range(20):
        chat.run(f"echo {number}")
    assert sum(len(file.read_text().splitlines()) for file in tmp_path.glob("*.hist")) == 5
    chat.run("x" * (editing.ENTRY_MAX + 1))
    assert chat.said("show") == "echo 19"
    for number in range(10):
        Chat(tmp_path, f"#{number}").run("echo 1")
    assert len(list(tmp_path.glob("*.hist"))) <= 4


def test_a_change_cannot_grow_without_bound(chat: Chat) -> None:
    chat.run("x" * 30000)
    assert "longer than" in chat.said("s/x/$`$'/g")
    assert "longer than" in chat.said(f"append '{'y' * 6000}'")


@pytest.mark.parametrize("regex", ["(a+)+b", "(a|a)*b", "(a*)*c", "(.*)(.*)(.*)x", "a{1,900}b"])
def test_time_of_a_regular_expression_grows_with_the_text_only(chat: Chat, regex: str) -> None:
    def seconds(size: int) -> float:
        chat.run("a" * size)
        begin = time.process_time()
        assert "No substitutions" in chat.said(f"s/{regex}/x/g") or "Bad regular" in chat.said(f"s/{regex}/x/g")
        return time.process_time() - begin

    small = seconds(3000)
    assert seconds(30000) < 40 * max(small, 0.01)


def test_an_old_history_is_read(tmp_path: Path) -> None:
    chat = Chat(tmp_path, "c")
    chat.run("echo 1")
    file = next(tmp_path.glob("*.hist"))
    file.write_text('{"code": "echo new"}\necho bare text\n[not json\n')
    assert chat.said("show") == "echo new"
    assert chat.said("undo") == "echo bare text"
    assert chat.said("undo") == "[not json"


def test_an_old_history_that_is_too_large_is_cut_at_an_entry(tmp_path: Path) -> None:
    chat = Chat(tmp_path, "c")
    chat.run("echo 1")
    file = next(tmp_path.glob("*.hist"))
    line = '{"code": "echo ' + "x" * 30_000 + '"}\n'
    file.write_text(line * 60)
    chat.run("echo 2")
    kept = file.read_text().splitlines()
    assert len(kept) == editing.FILE_MAX // len(line) + (editing.FILE_MAX % len(line) > len('{"code": "echo 2"}\n'))
    assert set(kept) == {'{"code": "echo 2"}', line.strip()}
    assert file.stat().st_size <= editing.FILE_MAX


def test_all_buffers_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "TOTAL_MAX", 10_000)
    for number in range(20):
        Chat(tmp_path, f"#{number}").run("x" * 2000)
    files = list(tmp_path.glob("*.hist"))
    assert sum(file.stat().st_size for file in files) <= 10_000
    assert Chat(tmp_path, "#19").said("show") == "x" * 2000


def test_a_history_that_somebody_else_holds_is_waited_for_a_moment(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing, "_LOCK", 0.1)
    chat.run("echo 1")
    with (tmp_path / "history/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HostError, match="cannot keep a history"):
            chat.run("echo 2")
    assert chat.run("echo 3") == "echo 3"


def test_a_full_disk_leaves_the_history_as_it_was(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.run("echo 1")

    def full(_path: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(HostError, match="No space left"):
            chat.run("echo 2")
    assert chat.said("show") == "echo 1"
    assert not list((tmp_path / "history").glob("*.new"))


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    def send(who: int) -> None:
        for number in range(20):
            Chat(tmp_path).run(f"echo {who} {number}")

    threads = [threading.Thread(target=send, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = next(tmp_path.glob("*.hist")).read_text().splitlines()
    assert len(kept) == 80


@pytest.mark.parametrize(
    "edit",
    [
        "undo " * 10_000, "append 'a' and " + "'a' and " * 3000 + "run", "s/a/b/ " * 5000, "replace 'a' with 'b' " * 2000,
        "copy " * 5000, "and " * 8000, "'" * 30_000, "s/" + "\\" * 30_000, "replace all 'a' with '" + "x" * 30_000 + "'",
        "s/a/" + "$`" * 15_000 + "/g", "-x " * 10_000 + "run", "s/(?P<" + "a" * 400 + ">.)/x/", "s/\\C/\ufffd/g",
        "s/" + "(" * 450 + "/x/", "s/a{1000}{1000}/x/", "show \x00", "copy \ud7ff", "s/\x00/x/", "replace '' with 'x'", "remove ''",
    ],
    ids=lambda edit: edit[:12].encode("unicode_escape").decode(),
)  # fmt: skip
def test_no_edit_breaks_or_grows(tmp_path: Path, edit: str) -> None:
    editor = Editor(tmp_path, usage="")
    editor.keep("#c", "sh", "a" * 32_000)
    said = editor.handle("#c", "sh", edit)
    assert len(said.text or said.code or "") <= max(editing.ENTRY_MAX, len(edit))
