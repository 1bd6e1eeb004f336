"""The style sheet of a page, for light and dark, narrow and wide.

The nine steps of the colour scale grow evenly from light to dark (YlGnBu of ColorBrewer, https://colorbrewer2.org, made
for colour-blind readers too); on a dark page they run the other way, so that the strong end always stands out.
"""

from __future__ import annotations

STEPS = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
LIGHT_TEXT = frozenset(STEPS[6:])  # the steps on which text is white

LIGHT = {
    "page": "#ffffff",
    "panel": "#f5f7fa",
    "text": "#1b2430",
    "faint": "#566270",
    "line": "#d5dbe3",
    "accent": "#0b62c4",
    "chosen": "#b3261e",
}
DARK = {
    "page": "#11161d",
    "panel": "#1a212b",
    "text": "#e4e9f0",
    "faint": "#a0acba",
    "line": "#374252",
    "accent": "#6db3ff",
    "chosen": "#ff8a75",
}


def _variables(colours: dict[str, str], steps: tuple[str, ...]) -> str:
    pairs = list(colours.items())
    for index, step in enumerate(steps):
        pairs += [(f"s{index}", step), (f"t{index}", "#ffffff" if step in LIGHT_TEXT else "#10151c")]
    return "".join(f"--{name}:{colour};" for name, colour in pairs)


_STEPS = "".join(
    f".s{index}{{background:var(--s{index});color:var(--t{index})}}rect.s{index}{{fill:var(--s{index})}}\n"
    for index in range(len(STEPS))
)

SHEET = f""":root{{color-scheme:light dark;{_variables(LIGHT, STEPS)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK, STEPS[::-1])}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}}
h1{{font-size:1.6rem;line-height:1.25;margin:0 0 1rem;overflow-wrap:anywhere}}
h2{{font-size:1.15rem;margin:0 0 .5rem;overflow-wrap:anywhere}}
section{{margin:0 0 2.25rem}}
p{{margin:0 0 .75rem;max-width:48rem;overflow-wrap:anywhere}}
.faint,figcaption{{color:var(--faint);font-size:.85rem;overflow-wrap:anywhere}}
figure{{margin:0 0 1rem}}
figcaption{{margin:.4rem 0 0}}
.scroll{{overflow-x:auto;margin:0 0 .75rem}}
table{{border-collapse:collapse;font-size:.85rem}}
th,td{{text-align:left;vertical-align:top;padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--line)}}
thead th{{color:var(--faint);font-weight:600;white-space:nowrap;vertical-align:bottom}}
td.number,th.number{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
td.short{{white-space:nowrap}}
tbody th{{font-weight:400;min-width:9rem;overflow-wrap:anywhere}}
.facts{{display:flex;flex-wrap:wrap;gap:.6rem;margin:0 0 2rem}}
.facts div{{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .8rem;min-width:0}}
.facts dt{{color:var(--faint);font-size:.8rem;overflow-wrap:anywhere}}
.facts dd{{margin:0;font-size:1.15rem;font-weight:600;overflow-wrap:anywhere}}
.tree,.tree ul{{list-style:none;margin:0;padding:0;font-size:.85rem}}
.tree ul{{margin-left:.45rem;border-left:1px solid var(--line);padding-left:.9rem}}
.tree li{{padding:.1rem 0}}
.tree summary{{cursor:pointer}}
.tree .name{{font-weight:600;overflow-wrap:anywhere}}
.tree .size{{color:var(--text);white-space:nowrap;font-variant-numeric:tabular-nums;margin:0 .5rem}}
.tree .note{{color:var(--faint);overflow-wrap:anywhere}}
.heat{{border-collapse:separate;border-spacing:2px}}
.heat th,.heat td{{border:0;padding:.15rem .5rem}}
.heat thead th{{vertical-align:bottom}}
.heat tbody th{{min-width:0;white-space:nowrap;text-align:right;color:var(--faint)}}
.heat thead th,.heat td{{text-align:center}}
.heat thead th{{white-space:normal;max-width:8rem}}
.heat td{{min-width:3.2rem;border-radius:.2rem;font-variant-numeric:tabular-nums;white-space:nowrap}}
.none{{outline:1px dashed var(--line);outline-offset:-1px;color:var(--faint)}}
.nan{{outline:2px solid var(--chosen);outline-offset:-2px;font-weight:700;color:var(--text);
background:repeating-linear-gradient(45deg,transparent 0 4px,var(--line) 4px 6px)}}
.legend{{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .6rem;font-size:.8rem;color:var(--faint)}}
.legend .scale{{display:inline-flex}}
.legend .scale span{{width:1.4rem;height:1rem}}
.legend .key{{padding:0 .5rem;border-radius:.2rem}}
.bars td{{vertical-align:middle}}
table.bars{{width:100%;max-width:46rem}}
.bars td.bar{{width:100%;min-width:6rem}}
.bars tbody th{{min-width:min(16rem,36vw)}}
.bars svg{{display:block;width:100%;height:.9rem}}
.bars rect{{fill:var(--accent)}}
.plot{{padding:.5rem 2rem 2.6rem 4.4rem;max-width:46rem}}
.plot svg{{display:block;width:100%;height:20rem;overflow:visible}}
.plot text{{font-size:12px;fill:var(--faint)}}
.plot .grid{{stroke:var(--line);stroke-width:1}}
.plot .front{{stroke:var(--accent);stroke-width:2}}
.plot circle{{fill:var(--page);stroke:var(--faint);stroke-width:1.5}}
.plot circle.on{{fill:var(--accent);stroke:var(--page)}}
.plot circle.chosen{{fill:var(--chosen);stroke:var(--page);stroke-width:2}}
.plot text.label{{fill:var(--text);paint-order:stroke;stroke:var(--page);stroke-width:3px}}
.plot text.chosen{{font-weight:700;fill:var(--chosen)}}
{_STEPS}"""
