"""Measure on which words the token rewards of trained policies land, and draw some pairs.

    python token_report.py run=[<run of DPO>,<run of TDPO2>] n_pairs=64 out=tokens0.html     one page for each seed
    python experiments/smollm/credit.py tokens*.html --names DPO,TDPO2 --out credit.json --picture tokens.svg --pairs 1,2

Reads pages of token_report.py with the same methods. A token's credit is beta (log pi - log pi_ref); that of a pair is the sum over the
chosen response minus the sum over the rejected one. Words that VADER rates are those by whose sentiment the pairs were ranked.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.frontier.report import by_measure, differences  # noqa: E402
from tdpo.files import replaced_whole  # noqa: E402

ROLES = {"chosen": 1, "rejected": -1}  # sign of a role's tokens in the credit of a pair
LISTED = 12  # words at each end of the list
SEEN = 4  # a word is listed if it has as many tokens on a page
WIDTH, SIZE, LINE = 920, 13, 24  # of the picture, px
ADVANCE = 0.602 * SIZE  # of a character of a monospaced font, px


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure on which words token rewards land.")
    parser.add_argument("pages", type=Path, nargs="+", help="written by token_report.py, one for each seed")
    parser.add_argument("--names", type=lambda text: text.split(","), required=True, help="of the methods, in the order of the pages' runs")
    parser.add_argument("--out", type=Path, help="file for the numbers (default: they are printed)")
    parser.add_argument("--picture", type=Path, help="SVG file, of the first page")
    parser.add_argument("--pairs", type=lambda text: [int(i) for i in text.split(",")], default=[1], help="pairs in it (default: 1)")
    arguments = parser.parse_args()
    pages = [read_page(file) for file in arguments.pages]
    if other := [file for file, page in zip(arguments.pages, pages) if len(page["runs"]) != len(arguments.names)]:
        sys.exit(f"error: '{other[0]}' has another number of runs than --names={','.join(arguments.names)}")
    if wrong := [i for i in arguments.pairs if not 1 <= i <= len(pages[0]["pairs"])]:
        sys.exit(f"error: --pairs: there is no pair {wrong[0]}, '{arguments.pages[0]}' has 1 to {len(pages[0]['pairs'])}")
    rated = rated_words()
    text = json.dumps(credit_of_methods(pages, arguments.names, rated), indent=1, ensure_ascii=False)
    if arguments.out is None:
        print(text)
    else:
        with replaced_whole(str(arguments.out)) as file:
            file.write(text + "\n")
    if arguments.picture is not None:
        with replaced_whole(str(arguments.picture)) as file:
            file.write(picture(pages[0], [i - 1 for i in arguments.pairs], arguments.names))


def read_page(file: Path) -> dict[str, Any]:
    """Return the numbers of a page of token_report.py.

    Raises:
        SystemExit: it is no such page.
    """
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', file.read_text(), re.DOTALL) if file.is_file() else None
    if found is None:
        sys.exit(f"error: '{file}' is no page of token_report.py")
    return json.loads(found[1])


def rated_words() -> set[str]:
    """Return the words that VADER rates, in lower case.

    Raises:
        SystemExit: VADER is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        sys.exit("error: the words that VADER rates are not installed: pip install vaderSentiment")
    return set(SentimentIntensityAnalyzer().lexicon)


def words_of(tokens: Sequence[Optional[str]]) -> list[str]:
    """Return for each token the word that it is part of, in lower case without punctuation.

    Args:
        tokens: their texts; None: part of the character before.
    """
    words, group, before = [""] * len(tokens), [], ""
    for i, token in enumerate([*tokens, " "]):
        begins = token is not None and not (token[:1].isalpha() and before[-1:].isalpha())  # otherwise the letters of a word go on
        if begins and group:
            word = "".join(tokens[j] or "" for j in group)
            for j in group:
                words[j] = word.strip(" \n.,!?;:\"'()*").lower()
            group = []
        group.append(i)
        before = token or before
    return words


def credits_of(page: Mapping, run: int, pair: Mapping, role: str) -> list[float]:
    """Return the credit of each token of a response, nats times beta."""
    values = pair["values"][run][role]
    return [page["runs"][run]["beta"] * (policy - reference) for policy, reference in zip(values["logps"], values["reference"])]


def credit_of_methods(pages: Sequence[Mapping], names: Sequence[str], rated: set[str]) -> dict[str, dict]:
    """Return where the credit of methods lands.

    Args:
        pages: of `read_page`, one for each seed.
        names: of their runs.
        rated: see `credit_of`.

    Returns:
        methods: name -> measure -> output of `over_seeds`, and highest and lowest, see `words_at_the_ends`; minus_first: name -> measure ->
        the same of differences from the first method, seed by seed.
    """
    found = {name: {seed: credit_of(page, run, rated) for seed, page in enumerate(pages)} for run, name in enumerate(names)}
    methods = {name: {**by_measure(found[name]), **words_at_the_ends(pages, run)} for run, name in enumerate(names)}
    return {"methods": methods, "minus_first": {name: differences(found[name], found[names[0]]) for name in names[1:]}}


def words_at_the_ends(pages: Sequence[Mapping], run: int) -> dict[str, list[list]]:
    """Return the words with the highest and the lowest mean credit of their tokens over all pages, with it and the number of the tokens."""
    by_word: dict[str, list[float]] = defaultdict(list)
    for word, credit, _ in (token for page in pages for token in credits_of_tokens(page, run)):
        by_word[word].append(credit)
    least = SEEN * len(pages)
    means = sorted((sum(some) / len(some), word, len(some)) for word, some in by_word.items() if word and len(some) >= least)
    ends = {"highest": means[::-1][:LISTED], "lowest": means[:LISTED]}
    return {end: [[word, round(value, 4), n] for value, word, n in some] for end, some in ends.items()}


def credits_of_tokens(page: Mapping, run: int) -> Iterator[tuple[str, float, int]]:
    """Yield of each token of a page the word that it is part of, its credit, and the sign of its role."""
    for pair in page["pairs"]:
        for role, sign in ROLES.items():
            for word, credit in zip(words_of(pair["tokens"][role]), credits_of(page, run, pair, role)):
                yield word, credit, sign


def credit_of(page: Mapping, run: int, rated: set[str]) -> dict[str, float]:
    """Return where the credit of one run lands.

    Args:
        page: of `read_page`.
        run: index of the run.
        rated: words whose share is measured.

    Returns:
        rated_tokens: share of the tokens that are part of rated words; margin: mean credit of a pair; margin_of_rated: the part of it on
        rated words; rated_margin: the share; size_of_rated, size_of_others: mean absolute credit of a token; last: mean credit of the last
        token of a response, which is its end unless it has been cut; seqkl: mean of both responses, nats.
    """
    tokens = list(credits_of_tokens(page, run))
    margin = {kind: sum(sign * credit for word, credit, sign in tokens if (word in rated) == kind) for kind in (True, False)}
    sizes = {kind: [abs(credit) for word, credit, _ in tokens if (word in rated) == kind] for kind in (True, False)}
    kls = [sum(pair["values"][run][role]["kl"]) for pair in page["pairs"] for role in ROLES]
    last = [credits_of(page, run, pair, role)[-1] for pair in page["pairs"] for role in ROLES]
    return {
        "rated_tokens": len(sizes[True]) / len(tokens),
        "margin": sum(margin.values()) / len(page["pairs"]),
        "margin_of_rated": margin[True] / len(page["pairs"]),
        "rated_margin": margin[True] / total if (total := sum(margin.values())) else 0.0,  # 0 for an untrained policy
        "size_of_rated": sum(sizes[True]) / max(1, len(sizes[True])),
        "size_of_others": sum(sizes[False]) / max(1, len(sizes[False])),
        "last": sum(last) / len(last),
        "seqkl": sum(kls) / len(kls),
    }


def picture(page: Mapping, pairs: Sequence[int], names: Sequence[str]) -> str:
    """Return an SVG picture of pairs: the colour of a token is its credit, blue above 0 and orange below, as on the page.

    Args:
        page: of `read_page`.
        pairs: indices of its pairs.
        names: of its runs.
    """
    parts, y = [], 10
    for pair in (page["pairs"][i] for i in pairs):
        for run, role in ((run, role) for run in range(len(page["runs"])) for role in ROLES):
            credits = credits_of(page, run, pair, role)
            title = f"{names[run]}, {role}: reward {sum(credits):.2f}, SeqKL {sum(pair['values'][run][role]['kl']):.2f} nats"
            y += LINE
            parts.append(f'<text x="12" y="{y}" fill="#57606a" font-size="12">{escape(title)}</text>')
            y += LINE
            x = 12.0
            for token, credit in zip(pair["tokens"][role], credits):
                shown = (token or " ").replace("\n", "⏎")
                width = len(shown) * ADVANCE
                if x + width > WIDTH - 12:
                    x, y = 12.0, y + LINE
                colour, opacity = "#1f77b4" if credit > 0 else "#d66012", min(1.0, abs(credit) / page["scale"]["reward"]) * 0.75
                parts.append(
                    f'<rect x="{x:.1f}" y="{y - 15}" width="{width:.1f}" height="20" rx="3" fill="{colour}" fill-opacity="{opacity:.2f}"/>'
                )
                parts.append(f'<text x="{x:.1f}" y="{y}" textLength="{width:.1f}" xml:space="preserve">{escape(shown)}</text>')
                x += width + 1
        y += 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 12}" font-family="monospace" font-size="{SIZE}">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
