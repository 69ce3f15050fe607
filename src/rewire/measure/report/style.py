"""How the page looks: on a phone, on a wide screen, in the light and in the dark."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1a1a1a; --page: #fff; --card: #f6f7f9; --line: #d5d8dc; --soft: #5c6066; --bad: #b34700;
  --c0: #7a8594; --c1: #0b6bcb; --c2: #b07aa1; --c3: #c2570c; --c4: #6b8f3c; --c5: #1d7a74 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --page: #14161a; --card: #1d2025; --line: #3a3f46; --soft: #a4a9b0; --bad: #ff9a52;
    --c0: #98a3b3; --c1: #5aa9f8; --c2: #d3a6c6; --c3: #f59a56; --c4: #a5c973; --c5: #5cc4bc } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; padding: 1rem; max-width: 76rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600 }
p { margin: .3rem 0 } .soft { color: var(--soft); fill: var(--soft) } .bad { color: var(--bad); font-weight: 600 }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem; min-width: 0 }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); font-variant-numeric: tabular-nums }
svg text.soft { fill: var(--soft) }
.grid { stroke: var(--line); stroke-width: 1 } .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none }
.line { fill: none !important; stroke-width: 2 }
.s0 { fill: var(--c0); stroke: var(--c0); background: var(--c0) } .s1 { fill: var(--c1); stroke: var(--c1);
  background: var(--c1) } .s2 { fill: var(--c2); stroke: var(--c2); background: var(--c2) }
.s3 { fill: var(--c3); stroke: var(--c3); background: var(--c3) } .s4 { fill: var(--c4); stroke: var(--c4);
  background: var(--c4) } .s5 { fill: var(--c5); stroke: var(--c5); background: var(--c5) }
rect.s0, rect.s1 { stroke: none }
.legend { font-size: .85rem } .legend span { margin-right: 1rem; white-space: nowrap }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line) }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; margin: 0 }
dd { margin: 0 }
""".strip()
