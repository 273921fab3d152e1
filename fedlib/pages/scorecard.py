"""The scorecard: a picture of a paper's claims with the effects that were measured, and the table behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fedlib.claims import results, score
from fedlib.claims.score import Score, bands
from fedlib.claims.scorecard import evidence
from fedlib.claims.verdicts import CONTRADICTED, SUPPORTED, UNDECIDED, UNTESTED, Band, Interval
from fedlib.pages.exhibit import Exhibit, picture, table
from fedlib.pages.page import NOT_RUN

# Colour and mark of a verdict: told apart without colour, and by those who do not see all colours.
STYLES = {
    SUPPORTED: {"color": "#029e73", "marker": "o"},
    CONTRADICTED: {"color": "#d55e00", "marker": "X"},
    UNDECIDED: {"color": "#0173b2", "marker": "s"},
    UNTESTED: {"color": "#949494", "marker": "D", "markerfacecolor": "white"},
}
HEADINGS = ("verdict", "effect (95 % interval)", "n", "must be", "note")


def overview(paper: str, profiles: Sequence[str], root: Path | None = None) -> Exhibit:
    """Claim by claim the effect with its interval beside the band of the criterion: a row for each of the profiles."""
    judged = [s for profile in profiles for s in score.scores(paper, profile, root) if s.verdict]
    claims = list(dict.fromkeys(s.claim["id"] for s in judged if s.finding))
    rows = {claim: [s for s in judged if s.claim["id"] == claim and s.finding] for claim in claims}
    if not rows:
        return table(_flatten(judged), f"Nothing was measured of the claims of {paper}.", f"verdicts-{paper}")
    heights = [0.55 + 0.3 * len(own) for own in rows.values()]
    figure = Figure(figsize=(7.2, 0.5 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, (claim, own) in zip(axes, rows.items(), strict=True):
        _draw_claim(ax, claim, own)
    for verdict, style in STYLES.items():
        axes[-1].plot([], [], linestyle="none", label=verdict, **style)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    facts = [f"{s.claim['id']}, {s.profile}: {tell(s.finding.effects[0])}, {s.verdict}" for s in judged if s.finding]
    left = sorted({s.claim["id"] for s in judged} - set(claims))
    more = f" Without a measurement: {', '.join(left)}." if left else ""
    caption = (
        f"Claims of {paper}: mark, the mean effect; bar, its 95 % interval; shaded, where the claim says that it lies, "
        f"lighter within our margin; an arrow, an end that the axis leaves out. Words below a bar name what "
        f"decides too.{more}"
    )
    alt = f"One row for each claim, with effect, interval and criterion. {'; '.join(facts)}."
    return picture(figure, alt, caption, _flatten(judged), f"verdicts-{paper}")


def _draw_claim(ax: Any, claim: str, own: Sequence[Score]) -> None:
    """One claim: its band, and one bar a profile, the largest first."""
    stated, margin = own[0].claim, own[0].claim.get("margin", 0)
    band = bands(stated)[0]
    effects = [s.finding.effects[0] for s in own if s.finding]
    low, high = _limits(effects, band)
    for inner, alpha in ((0.0, 0.15), (margin, 0.15)):
        ax.axvspan(max(low, band.low + inner), min(high, band.high - inner), color="#029e73", alpha=alpha, lw=0)
    for place, (s, effect) in enumerate(zip(own, effects, strict=True)):
        style = STYLES[s.verdict]
        ends = [max(low, effect.low), min(high, effect.high)]
        ax.plot(ends, [place, place], color=style["color"], linewidth=2)
        for end, beyond, mark in zip(ends, (effect.low < low, effect.high > high), "<>", strict=True):
            if beyond:  # the interval goes on
                ax.plot(end, place, marker=mark, color=style["color"], markersize=7, clip_on=False)
        ax.plot(effect.mean, place, markersize=8, **style)
        words = ax.annotate(_tell_more(s), (0.01, place + 0.33), xycoords=("axes fraction", "data"))
        words.set(fontsize="x-small", va="center")  # below the bar
    ax.set(xlim=(low, high), ylim=(len(own) - 0.4, -0.6), xlabel="")
    ax.set_yticks(range(len(own)), [s.profile for s in own], fontsize="small")
    ax.set_title(f"{claim}: {stated['unit']}", loc="left", fontsize="small")
    ax.tick_params(axis="x", labelsize="small")
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x", alpha=0.4)


def _tell_more(s: Score) -> str:
    """What decides beside the effect that is drawn: what must go with it, or cases that lie outside."""
    if s.finding and "joint" in s.claim:
        return f"with it: {s.claim['joint']['measure'].replace('_', ' ')} {tell(s.finding.effects[1])}"
    return "cases lie outside" if s.note.startswith("outside by themselves") else ""


def _limits(effects: Sequence[Interval], band: Band) -> tuple[float, float]:
    """Ends of the axis: the limits of the band and the effects are on it, and of wide intervals as much as there is
    room for."""
    known = [end for end in (band.low, band.high) if math.isfinite(end)] + [effect.mean for effect in effects]
    room = 1.5 * (max(known) - min(known)) or max(1e-3, 0.1 * abs(known[0]))
    low = min([*known, *(max(e.low, min(known) - room) for e in effects)])
    high = max([*known, *(min(e.high, max(known) + room) for e in effects)])
    edge = 0.06 * (high - low) or room
    return low - edge, high + edge


def card(paper: str, profile: str, root: Path | None = None) -> Exhibit:
    """The scores of a paper at a profile. The CSV has the cases of each claim too, and names the records behind it."""
    scores = score.scores(paper, profile, root)
    runs, _ = results.read(paper, profile, root=root)
    frame = pd.DataFrame([{"claim": s.claim["says"]} | _row(s) for s in scores])
    numbers = frame.assign(
        id=[s.claim["id"] for s in scores],
        profile=profile,
        cases=[_cases(s) for s in scores],
        records=[" ".join(evidence(s, runs, f"records/{paper}/{profile}")) for s in scores],
    )
    caption = f"Claims of {paper} against the records of profile {profile}; below them what we observe beside them."
    return table(frame, caption, f"scorecard-{paper}-{profile}", numbers=numbers)


def _row(s: Score) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(HEADINGS, "–")
    row |= {"verdict": s.verdict or "observed", "note": s.note or "–"}
    if "quantifier" in s.claim:
        row["must be"] = " and ".join(filter(None, [_tell_band(s.claim), _tell_joint(s.claim)]))
    if s.finding:
        row |= {"effect (95 % interval)": "; ".join(map(tell, s.finding.effects)), "n": s.finding.effects[0].n}
    return row


def tell(interval: Interval) -> str:
    """Mean and ends, with as many places as the width of the interval, or the mean, calls for."""
    width = interval.high - interval.low
    digits, scale = (2, width) if 0 < width < math.inf else (3, abs(interval.mean) or 1.0)
    places = min(4, max(0, digits - 1 - math.floor(math.log10(scale) + 1e-9)))
    mean, low, high = (f"{value:.{places}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def quote(scores: Sequence[Score]) -> dict[str, str]:
    """Of each claim, for the sentences of a page: its effect, what goes with it (`also`), number of seeds, verdict."""
    numbers: dict[str, str] = {}
    for s in scores:
        effects = list(map(tell, s.finding.effects)) if s.finding else [NOT_RUN]
        row = {"effect": effects[0], "also": effects[-1], "verdict": s.verdict}
        row["n"] = str(s.finding.effects[0].n) if s.finding else NOT_RUN
        numbers |= {f"{name}-{s.claim['id']}": word for name, word in row.items()}
    return numbers


def _tell_band(criterion: dict[str, Any]) -> str:
    ends = [f"{word} {criterion[key]:g}" for key, word in (("at_least", "≥"), ("at_most", "≤")) if key in criterion]
    margin = f" (margin {criterion['margin']:g})" if criterion.get("margin") else ""
    quantifier = f"{criterion['quantifier']}: " if "quantifier" in criterion else ""
    return f"{quantifier}{', '.join(ends)}{margin}"


def _tell_joint(claim: dict[str, Any]) -> str:
    return f"{claim['joint']['measure'].replace('_', ' ')} {_tell_band(claim['joint'])}" if "joint" in claim else ""


def _cases(s: Score) -> str:
    found = s.finding.cases.items() if s.finding else ()
    return "; ".join(f"{case}: {', '.join(map(tell, intervals))}" for case, intervals in found)


def _flatten(judged: Sequence[Score]) -> pd.DataFrame:
    rows = []
    for s in judged:
        effect = s.finding.effects[0] if s.finding else Interval(math.nan, math.nan, math.nan, 0)
        row = {"claim": s.claim["id"], "profile": s.profile, "verdict": s.verdict, "effect": effect.mean}
        rows.append(row | {"low": effect.low, "high": effect.high, "n": effect.n, "note": s.note})
    return pd.DataFrame(rows)
