"""English prose for calibration and evaluation: the Wikipedia dump sample inside the gensim wheel, plainly cleaned.

The sample holds about a hundred articles of 2014-2016. Cleaning is regular expressions on wiki markup: what is not
running text (templates, tables, references, galleries, lists, closing sections) goes, links and emphasis become their
words. Articles are dealt out by index modulo 3 to calib, valid and test, so that nothing is tuned on what it is judged
by. Every article starts with A, and remnants such as "Albedo ()" or a lost template argument remain: good enough to
compare models on, not a corpus to train on. The text is CC BY-SA 3.0 and GFDL, by the contributors of the articles
named in its headings.

Layout as in the wikitext corpora: ` = Heading = ` lines, one paragraph a line, a space at both ends; no `<unk>`, no
tokenization. Specification: models-and-data §4.1.
"""

from __future__ import annotations

import bz2
import html
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from numfit.checkpoint.plain_directory import temporary_sibling
from numfit.demo.packages import WIKIPEDIA_DUMP, cache_directory, fetch
from numfit.errors import NumfitError

SPLITS = ("calib", "valid", "test")  # article index modulo 3
SHORTEST_ARTICLE, SHORTEST_LINE = 2000, 40  # characters
CLOSING_SECTIONS = frozenset(
    [
        "references",
        "external links",
        "see also",
        "notes",
        "further reading",
        "bibliography",
        "sources",
        "footnotes",
        "citations",
        "notes and references",
        "references and notes",
        "works cited",
        "gallery",
        "publications",
        "selected works",
        "selected bibliography",
        "primary sources",
        "secondary sources",
        "explanatory notes",
        "general references",
        "cited sources",
    ]
)
NOTICE = """The texts in this directory are prose of English Wikipedia articles (2014-2016), cleaned by numfit from the
dump sample that the Python package gensim 4.4.0 carries. Authors: the contributors of the articles
named by the headings. Licence: GFDL, and Creative Commons Attribution-ShareAlike 3.0
(https://creativecommons.org/licenses/by-sa/3.0/).
"""

COMMENT = re.compile(r"<!--.*?-->", re.S)
# Elements whose content is no prose; the self-closing form first, else it would swallow up to the next closing tag.
DROPPED = "ref|gallery|math|timeline|score|syntaxhighlight|source|imagemap|pre|references|hiero|chem|graph"
ELEMENT = re.compile(rf"<(?:{DROPPED})\b[^<>]*/\s*>|<({DROPPED})\b[^<>]*>.*?</\1\s*>", re.S | re.I)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)  # innermost
TEMPLATE = re.compile(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", re.S)  # innermost
LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.S)  # innermost
EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\]]*)\]")
NAMESPACE = re.compile(
    r":?(?:file|image|category|media|wikipedia|template|wikt|wiktionary|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.I
)
FIELD_END = re.compile(r"\|(?![^\[\]]*\]\])")  # a bar that is not inside a link
HEADING = re.compile(r"(={2,6})\s*(.*?)\s*\1\s*")
EMPTY_PARENTHESES = re.compile(r"\s*\((?:[\s,;:/–-]|or|and)*\)")
DISAMBIGUATION = re.compile(r"\{\{\s*(?:disambig|dab|hndis|geodis|surname|given name)", re.I)


def wikipedia_texts(cache: Path | None = None) -> dict[str, Path]:
    """Paths of the three texts ("calib", "valid", "test"), fetched and cleaned on the first call.

    Raises:
        NumfitError: see `packages.fetch`.
    """
    directory = (cache or cache_directory()) / "wikipedia"
    if not directory.is_dir():
        dump = fetch(WIKIPEDIA_DUMP, cache)
        try:
            with temporary_sibling(directory) as stage, bz2.open(dump, "rb") as xml:
                for split, text in split_texts(clean_articles(xml)).items():
                    (stage / f"enwiki.{split}.txt").write_text(text, encoding="utf-8", newline="\n")
                (stage / "LICENSE.txt").write_text(NOTICE, encoding="utf-8", newline="\n")
                os.replace(stage, directory)
        except OSError as error:
            raise NumfitError(f"cannot write {directory}: {error.strerror or error}; set XDG_CACHE_HOME") from error
    return {split: directory / f"enwiki.{split}.txt" for split in SPLITS}


def clean_articles(xml: IO[bytes]) -> Iterator[str]:
    """The usable articles of a MediaWiki XML dump as plain text, in the order of the dump.

    Skips redirects, disambiguation pages, pages outside the article namespace, and what is too short after cleaning.
    """
    for _, page in ElementTree.iterparse(xml):
        if page.tag.rpartition("}")[2] != "page":
            continue
        field = {child.tag.rpartition("}")[2]: child.text or "" for child in page.iter()}
        title, text = field.get("title", ""), field.get("text", "")
        skipped = "redirect" in field or field.get("ns", "0") != "0" or title.endswith("(disambiguation)")
        if not (skipped or text[:9].upper() == "#REDIRECT" or DISAMBIGUATION.search(text)):
            article = clean_article(title, text)
            if len(article) >= SHORTEST_ARTICLE:
                yield article
        page.clear()


def split_texts(articles: Iterator[str]) -> dict[str, str]:
    """Deal the articles out by index modulo 3."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for index, article in enumerate(articles):
        parts[SPLITS[index % len(SPLITS)]].append(article)
    return {split: "".join(texts) for split, texts in parts.items()}


def clean_article(title: str, markup: str) -> str:
    """One article's wiki markup as headings and paragraphs."""
    out = [f"\n = {title} = \n\n"]
    heading, skipping = None, 0  # a heading waits for its first paragraph; `skipping` is the level of a closing section
    for line in strip_markup(markup).split("\n"):
        match = HEADING.fullmatch(line.strip())
        if match:
            level = len(match[1])
            if skipping and level > skipping:
                continue
            skipping = level if match[2].strip().lower() in CLOSING_SECTIONS else 0
            heading = match[2]
            continue
        if skipping or not line or line[0] in "*#:;|! \t" or line.startswith("__"):
            continue
        line = tidy(line)
        if len(line) < SHORTEST_LINE:
            continue
        if heading:
            out.append(f"\n = {tidy(heading)} = \n\n")
            heading = None
        out.append(f" {line} \n")
    return "".join(out) if len(out) > 1 else ""


def strip_markup(markup: str) -> str:
    """Remove or resolve everything that is not text, keeping line structure and headings."""
    text = ELEMENT.sub("", COMMENT.sub("", markup))
    text = _innermost_first(TEMPLATE, _template, text)
    text = _innermost_first(TABLE, lambda match: "", text)
    text = EXTERNAL_LINK.sub(lambda match: match[1], text)
    text = _innermost_first(LINK, _link, text)
    text = html.unescape(html.unescape(TAG.sub("", text)))
    text = re.sub(r"'{2,5}", "", text)
    return text.replace("\u00a0", " ").replace("\u200b", "")


def tidy(line: str) -> str:
    """Mend what removals left: empty parentheses, doubled spaces, a space before punctuation."""
    line = EMPTY_PARENTHESES.sub("", line)
    line = re.sub(r"\(\s*[,;]\s*", "(", line)
    line = re.sub(r"\s*[,;]\s*\)", ")", line)
    line = re.sub(r"\s+", " ", line)
    return re.sub(r" ([,.;:)])", r"\1", line).strip()


def _innermost_first(pattern: re.Pattern[str], replacement, text: str) -> str:
    while True:
        text, count = pattern.subn(replacement, text)
        if not count:
            return text


def _template(match: re.Match[str]) -> str:
    name, *fields = (part.strip() for part in FIELD_END.split(match[1]))
    name = name.lower()
    plain = [field for field in fields if "=" not in field]
    if name in ("convert", "cvt") and len(plain) >= 2:
        return f"{plain[0]} {plain[1]}"
    if (name == "lang" or name.startswith(("lang-", "nowrap", "transl", "quote"))) and plain:
        return plain[-1]
    return ""


def _link(match: re.Match[str]) -> str:
    target, *labels = match[1].split("|")
    if NAMESPACE.match(target.strip()) and not (labels and target.startswith(":")):
        return ""
    return labels[-1] if labels else target.lstrip(":")
