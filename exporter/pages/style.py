"""The style of the pages that ``sam3x bench`` and ``sam3x doctor`` write: self-contained, light and dark."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1d2126;--soft:#646c76;--line:#e3e5e8;--bad:#b3261e;
--a0:#2563c9;--a1:#0f8a7e;--a2:#8a4fc4;--a3:#c4622d;--a4:#b03a72;--a5:#5d7a1f;
--b0:#5b6470;--b1:#98825b;--b2:#8391a5;--b3:#a3a9b1}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1c2026;--ink:#e7e9ec;--soft:#9aa3ae;--line:#30363e;
--bad:#ff8a80;--a0:#6aa5ff;--a1:#3ec9b8;--a2:#bd8bf0;--a3:#f09a66;--a4:#ee7fb0;--a5:#a5c75c;
--b0:#a3adba;--b1:#cdb684;--b2:#71809a;--b3:#5f6873}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}h2{font-size:19px;margin:44px 0 12px}
h3{font-size:14px;margin:0 0 10px;font-weight:600}p{max-width:76ch;margin:8px 0}.soft,figcaption,dt{color:var(--soft)}
figcaption{font-size:12.5px;margin-top:8px}pre,code{font:13px/1.5 ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:14px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:14px 0;font-size:14px}dd{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px 14px}
svg{display:block;width:100%;height:auto}svg text{fill:var(--ink);font-size:12.5px}svg .soft{fill:var(--soft);font-size:11.5px}
svg .strong{font-weight:600}
.grid{stroke:var(--line)}.mark{stroke:var(--soft);stroke-dasharray:4 3}.whisker{stroke:var(--ink);opacity:.6}
.line{fill:none;stroke-width:2.25;stroke-linejoin:round}.dashed{stroke-dasharray:6 4}
.table{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;margin-top:16px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--soft);vertical-align:bottom;white-space:normal}tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
.dot{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:8px}
.bad{color:var(--bad);margin:6px 0}
details{margin-top:18px}summary{cursor:pointer;color:var(--soft)}details pre{max-height:420px}
"""
