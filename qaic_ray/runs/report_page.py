"""A report as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from qaic_ray.runs.figures import count_text, rate_text, seconds_text

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --card: #fff; --ink: #1d1f23;
  --quiet: #646a73; --line: #e3e1dc; --bar: #3a7ca5; --warn: #8a5300; --warn-ground: #fdf1dc;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --card: #1e2126; --ink: #e8e6e1;
  --quiet: #9aa1ab; --line: #32363d; --bar: #6fb3d9; --warn: #f2c879; --warn-ground: #3a2f1a;
  --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; }
h2 { margin: 2.25rem 0 .5rem; font-size: 1rem; }
p { margin: .25rem 0; }
.quiet, th, dt, .note { color: var(--quiet); }
.badge { display: inline-block; margin-top: .75rem; padding: .2rem .6rem; border-radius: .4rem;
  background: var(--warn-ground); color: var(--warn); }
.bad { color: var(--bad); }
p.bad { margin-top: .75rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }
dl div { padding: .75rem 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card); }
dt { font-size: .8rem; }
dd { margin: 0; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
dd small { display: block; color: var(--quiet); font-size: .85rem; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; font-size: .8rem; }
th, td { padding: .4rem .75rem .4rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr { border-bottom: 1px solid var(--line); }
tfoot tr { border: 0; font-weight: 600; }
th.rate, td.rate { width: 30%; padding-left: 1.25rem; text-align: left; }
.rate i { display: inline-block; height: .7rem; margin-right: .5rem; border-radius: .2rem;
  background: var(--bar); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg rect { fill: var(--bar); }
svg line { stroke: var(--line); }
svg text { fill: var(--quiet); font-size: 11px; }
.note { margin-top: 2.5rem; font-size: .85rem; overflow-wrap: anywhere; }
"""


def html_page(document: dict[str, Any]) -> str:
    """Draw a report's document (`report.json`) as a page."""
    job = escape(document["job"])
    body = "\n".join(
        [
            f"<h1>{job}</h1>",
            *_facts(document),
            *_tiles(document),
            *_errors(document),
            "<h2>Cards</h2>",
            *_card_table(document),
            '<div class="pair">',
            *_figure("Time to first token, seconds", document["ttft_s_histogram"]),
            *_figure("Tokens of an answer", document["generated_tokens_histogram"]),
            "</div>",
            f'<p class="note">Run folder {escape(document["folder"])}</p>',
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{job}</title>\n'
        f"<style>{_STYLE}</style>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _facts(document: dict[str, Any]) -> Iterable[str]:
    facts = [document["model"], document["qpc"], "" if document["emulated"] else document["sdk"]]
    if any(facts):
        yield f'<p class="quiet">{escape(" · ".join(filter(None, facts)))}</p>'
    if document["emulated"]:
        sdk = escape(document["sdk"])
        yield f'<p class="badge">{sdk}: computed on a CPU, not a card\'s speed</p>'


def _tiles(document: dict[str, Any]) -> Iterable[str]:
    answered = document["rows"] - document["failed_rows"]
    seconds = seconds_text(document["seconds"])
    tiles = (
        ("merged", rate_text(document["tokens_per_s"]), "tokens/s"),
        ("answered", count_text(answered), f"of {count_text(document['rows'])} prompts"),
        ("generated", count_text(document["generated_tokens"]), f"tokens in {seconds}"),
        (
            "time to first token",
            seconds_text(document["ttft_median_s"]),
            f"median; 9 of 10 within {seconds_text(document['ttft_p90_s'])}",
        ),
    )
    yield "<dl>"
    for name, figure, unit in tiles:
        yield f"<div><dt>{name}</dt><dd>{figure} <small>{unit}</small></dd></div>"
    yield "</dl>"


def _errors(document: dict[str, Any]) -> Iterable[str]:
    lost = [f"{w['name']} was lost: {w['error']}" for w in document["workers"] if w["error"]]
    for text in (*lost, *filter(None, [document["error"]])):
        yield f'<p class="bad">{escape(text)}</p>'


def _card_table(document: dict[str, Any]) -> Iterable[str]:
    best = max((w["decode_tokens_per_s"] or 0.0 for w in document["workers"]), default=0.0)
    yield '<div class="wide"><table><thead><tr><th>card</th><th>prompts</th><th>prompt tokens</th>'
    yield "<th>generated</th><th>TTFT median</th>"
    yield '<th class="rate">decode tokens/s</th></tr></thead><tbody>'
    for worker in document["workers"]:
        rate = worker["decode_tokens_per_s"]
        width = 10.0 * rate / best if rate and best else 0.0
        bar = f'<i style="width: {width:.2f}rem"></i>'
        ttft = seconds_text(worker["ttft_median_s"])
        mark = ' class="bad"' if worker["error"] else ""
        yield f"<tr><td{mark}>{escape(worker['name'])}</td>{_cells(worker)}<td>{ttft}</td>"
        yield f'<td class="rate">{bar}{rate_text(rate)}</td></tr>'
    yield f"</tbody><tfoot><tr><td>all</td>{_cells(document)}"
    yield f"<td>{seconds_text(document['ttft_median_s'])}</td><td></td></tr></tfoot></table></div>"


def _cells(counts: dict[str, Any]) -> str:
    names = ("rows", "prompt_tokens", "generated_tokens")
    return "".join(f"<td>{count_text(counts[name])}</td>" for name in names)


def _figure(title: str, histogram: dict[str, Any]) -> Iterable[str]:
    """A histogram as SVG; the highest bar and some edges carry their figures."""
    edges, counts = histogram["edges"], histogram["counts"]
    yield f"<figure><h2>{title}</h2>"
    if not counts:
        yield '<p class="quiet">No answers.</p></figure>'
        return
    width, height, top = 460.0, 130.0, 16.0
    step = width / len(counts)
    highest = max(counts)
    box = f"-2 0 {width + 4:g} {height + top + 20:g}"
    yield f'<svg viewBox="{box}" role="img" aria-label="{title}">'
    for i, count in enumerate(counts):
        tall = height * count / highest
        box = f'x="{i * step + 1:.1f}" y="{top + height - tall:.1f}" width="{step - 2:.1f}"'
        label = f"from {edges[i]:g}, under {edges[i + 1]:g}: {count_text(count)} answers"
        yield f'<rect {box} height="{tall:.1f}" rx="1.5"><title>{label}</title></rect>'
    peak = counts.index(highest)
    yield _label((peak + 0.5) * step, top - 4, count_text(highest))
    yield f'<line x1="0" x2="{width:g}" y1="{top + height:g}" y2="{top + height:g}"/>'
    every = -(-len(counts) // 5)
    for i in range(0, len(edges), every):
        anchor = "start" if i == 0 else "end" if i == len(counts) else "middle"
        yield _label(i * step, top + height + 15, f"{edges[i]:g}", anchor)
    yield "</svg></figure>"


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:g}" text-anchor="{anchor}">{text}</text>'
