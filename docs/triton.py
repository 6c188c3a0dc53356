"""Draws docs/triton.svg: the data flow of the two passes. ``python docs/triton.py``"""

from __future__ import annotations

from pathlib import Path

BIG, SMALL, KERNEL = "#4477aa", "#ccbb44", "#f4f4f4"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    dark = fill == BIG
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="#333"/>'
    first = y + height / 2 - 9 * (len(lines) - 1) + 5
    words = "".join(
        f'<text x="{x + width / 2}" y="{first + 18 * i:g}" fill="{"white" if dark else "black"}">{line}</text>'
        for i, line in enumerate(lines)
    )
    return shape + words


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#333" stroke-width="1.5" marker-end="url(#head)"/>'


def main() -> None:
    parts = [
        box(20, 70, 90, 260, BIG, "X", "N × D"),
        box(210, 20, 150, 60, KERNEL, "prepare", "G = WdᵀWd, bd·Wd"),
        box(210, 130, 150, 120, KERNEL, "pass 1: encode", "tiles of rows", "X·[Weᵀ, Wd] → U, Q", "Z, E, dU, Σ R²"),
        box(420, 100, 50, 180, SMALL, "Z", "N × K"),
        box(480, 100, 50, 180, SMALL, "dU", "N × K"),
        box(590, 130, 160, 120, KERNEL, "pass 2: collect", "columns × shares of rows", "Xᵀ·[Z, dU], ZᵀZ, sums"),
        box(810, 150, 110, 80, KERNEL, "finish", "adds shares", "in order"),
        box(810, 290, 110, 60, SMALL, "loss, dWe, dWd", "dbe, dbd"),
        box(230, 330, 110, 40, SMALL, "We, Wd, be, bd"),
        arrow(110, 190, 206, 190),
        arrow(285, 80, 285, 126),
        arrow(285, 330, 285, 254),
        arrow(360, 190, 416, 190),
        arrow(530, 190, 586, 190),
        arrow(750, 190, 806, 190),
        arrow(865, 230, 865, 286),
        '<path d="M65 330 V400 H670 V254" fill="none" stroke="#333" stroke-width="1.5" marker-end="url(#head)"/>',
        '<text x="480" y="393">X is read a second time</text>',
        '<text x="158" y="180">read once</text>',
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 415" font-family="sans-serif" font-size="13" '
        'text-anchor="middle"><rect width="940" height="415" fill="white"/><defs><marker id="head" markerWidth="9" '
        'markerHeight="7" refX="8" refY="3.5" orient="auto"><path d="M0 0 L9 3.5 L0 7 z" fill="#333"/></marker></defs>'
    )
    Path(__file__).with_suffix(".svg").write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    main()
