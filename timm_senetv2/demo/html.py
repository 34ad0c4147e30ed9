"""An answer as HTML: headings, a list with bars, pictures with texts beside them. All names in it are escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from PIL import Image

from .classify import Answer, Gates

_BINS = 40
_ROOM, _ROW, _STRIP = 240, 18, 14
_LETTER = 6.5  # width of a letter in the picture of the gates

CSS = """
.sae-answers { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.sae-answers > section { flex: 1 1 18rem; min-width: 0; overflow-wrap: anywhere; }
.sae-answers h3 { font-size: 1.05rem; margin: 0 0 .4rem; }
.sae-answers h4 { font-size: .95rem; margin: 1.1rem 0 .3rem; }
.sae-answers p { margin: .3rem 0; }
.sae-answers ol { list-style: none; margin: 0; padding: 0; }
.sae-answers ol li { margin: .35rem 0; }
.sae-answers .sae-line { display: flex; justify-content: space-between; gap: 1rem; }
.sae-answers .sae-bar { background: var(--border-color-primary); height: .5rem; border-radius: .25rem; }
.sae-answers .sae-bar > div { background: #4263eb; height: 100%; border-radius: .25rem; min-width: 2px; }
.sae-answers .sae-pictures { display: flex; flex-wrap: wrap; gap: .75rem; }
.sae-answers figure { margin: 0; flex: 1 1 8rem; max-width: 16rem; }
.sae-answers figure img { width: 100%; height: auto; border-radius: .25rem; display: block; }
.sae-answers figcaption, .sae-answers .sae-small { font-size: .85rem; }
.sae-answers svg { width: 100%; height: auto; max-width: 34rem; display: block; }
.sae-answers table { border-collapse: collapse; font-size: .85rem; width: 100%; }
.sae-answers th, .sae-answers td { text-align: right; padding: .15rem .3rem; }
.sae-answers th:first-child { text-align: left; font-weight: normal; }
.sae-answers summary { cursor: pointer; }
.sae-refused { border-left: .3rem solid #c92a2a; padding: .5rem .8rem; }
"""


def page(sections: Sequence[str]) -> str:
    """Sections side by side where there is room for them."""
    return f'<div class="sae-answers">{"".join(sections)}</div>'


def refusal(message: str, heading: str = 'Not possible') -> str:
    """What was refused and what to do, read out at once by screen readers."""
    return f'<section class="sae-refused" role="alert"><h3>{escape(heading)}</h3><p>{escape(message)}</p></section>'


def answer(label: str, found: Answer, note: str = '') -> str:
    """A section with everything that a model says of an image.

    Args:
        label: The model as the page calls it.
        found: From `Classifier`.
        note: What to know about its weights.
    """
    best, probability = found.top[0]
    threads = torch.get_num_threads()
    status = (
        f'{best}, {probability:.1%}. The network took {found.seconds * 1000:.1f} ms on {threads} '
        f'processor thread{"s" if threads > 1 else ""}.'
    )
    return (
        f'<section><h3>{escape(label)}</h3><p role="status">{escape(status)}</p>'
        + (f'<p class="sae-small"><strong>Note:</strong> {escape(note)}</p>' if note else '')
        + f'<h4>Most probable classes</h4>{_bars(found.top)}'
        + f'<h4>Where {escape(best)} is seen</h4>{_pictures(found, best)}'
        + f'<h4>Gates by block</h4>{_gates(found.gates)}</section>'
    )


def _bars(top: Sequence[tuple[str, float]]) -> str:
    rows = ''.join(
        f'<li><div class="sae-line"><span>{escape(name)}</span><span>{share:.1%}</span></div>'
        f'<div class="sae-bar" aria-hidden="true"><div style="width:{100 * share:.1f}%"></div></div></li>'
        for name, share in top
    )
    return f'<ol>{rows}</ol>'


def _pictures(found: Answer, best: str) -> str:
    seen = _figure(found.seen, 'The image as it enters the network', 'What the network sees')
    if found.overlay is None:
        return f'<div class="sae-pictures">{seen}</div><p>No class-activation map: no place of the last stage speaks '
        'for this class, or the model has no map there.</p>'
    bright = f'The image under a heat map: bright where it speaks for {best}'
    return (
        f'<div class="sae-pictures">{seen}{_figure(found.overlay, bright, "Class-activation map (Grad-CAM)")}</div>'
        f'<p class="sae-small">Bright places raise the score of {escape(best)}.</p>'
    )


def _figure(image: Image.Image, alt: str, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, 'PNG')
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _gates(gates: Sequence[Gates]) -> str:
    if not gates:
        return '<p>This model has no channel attention, so it has no gates.</p>'
    means = [float(block.values.mean()) for block in gates]
    low, high = means.index(min(means)), means.index(max(means))
    low_text = f'{means[low]:.2f} in {gates[low].block}'
    summary = f'Mean gate from {low_text} to {means[high]:.2f} in {gates[high].block}, over {len(gates)} blocks.'
    rows = ''.join(
        f'<tr><th scope="row">{escape(block.block)}</th><td>{len(block.values)}</td><td>{block.values.min():.2f}</td>'
        f'<td>{block.values.mean():.2f}</td><td>{block.values.max():.2f}</td></tr>'
        for block in gates
    )
    return (
        '<p class="sae-small">A gate scales one channel of its block. Each row is a block: the stronger the '
        'colour, the more of its channels have that gate. The line is their mean.</p>'
        f'{_strips(gates, means, summary)}<p class="sae-small">{escape(summary)}</p>'
        '<details><summary>The same as a table</summary><table><thead><tr><th scope="col">Block</th>'
        '<th scope="col">Channels</th><th scope="col">Lowest</th><th scope="col">Mean</th><th scope="col">Highest</th>'
        f'</tr></thead><tbody>{rows}</tbody></table></details>'
    )


def _strips(gates: Sequence[Gates], means: Sequence[float], summary: str) -> str:
    """A row a block: the histogram of its gates as shades, from the lowest to the highest value that a gate takes."""
    first = min(0.0, *(float(np.floor(block.values.min())) for block in gates))
    last = max(1.0, *(float(np.ceil(block.values.max())) for block in gates))
    left = _LETTER * max(6, *(len(block.block) for block in gates)) + 6
    parts = []
    for row, (block, mean) in enumerate(zip(gates, means, strict=True)):
        y = row * _ROW
        counts, _ = np.histogram(block.values, bins=_BINS, range=(first, last))
        parts.append(f'<text x="0" y="{y + 11}" font-size="12" fill="currentColor">{escape(block.block)}</text>')
        parts.append(
            f'<rect x="{left:g}" y="{y}" width="{_ROOM}" height="{_STRIP}" fill="currentColor" fill-opacity=".06"/>'
        )
        for i, count in enumerate(counts):
            if count:
                parts.append(
                    f'<rect x="{left + i * _ROOM / _BINS:.1f}" y="{y}" width="{_ROOM / _BINS:.1f}" height="{_STRIP}" '
                    f'fill="#4263eb" fill-opacity="{0.15 + 0.85 * count / counts.max():.2f}"/>'
                )
        at = left + _ROOM * (mean - first) / (last - first)
        parts.append(f'<rect x="{at - 1:.1f}" y="{y - 1}" width="2" height="{_STRIP + 2}" fill="currentColor"/>')
    bottom = len(gates) * _ROW
    for value in (first, (first + last) / 2, last):
        x = left + _ROOM * (value - first) / (last - first)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 12}" font-size="12" fill="currentColor" text-anchor="middle">'
            f'{value:g}</text>'
        )
    return (
        f'<svg role="img" aria-label="{escape(summary)}" viewBox="0 -2 {left + _ROOM + 12:g} {bottom + 20}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
