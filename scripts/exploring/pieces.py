"""The pieces of HTML of scripts/explore.py. All text of users is escaped."""

import html
import time

from internals.plots import NORMALIZED

from .completions import PLANE, overlay, picture_of
from .views import USUAL_RATIO, encoded

THUMBS = 12  # pictures shown to pick from
LETTERS = "ABC"  # names of the chosen codes
FAR = 0.2  # from the usual share of masked patches, from which on a note says so


def image(data, alt=""):
    """An <img> of a PNG in base64."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def image_of(cell, alt=""):
    """An <img> of a tensor uint8 (3, H, W)."""
    return image(encoded(picture_of(cell)), alt)


def thumbs_html(library, first, current):
    """The pictures from index `first` on, to pick from."""
    buttons = []
    for index in library.readable(first):
        data, name = library.encoded(index), library.name(index)
        here = "here" if data == current else ""
        label = html.escape(name)
        buttons.append(
            f'<button class="{here}" data-index="{index}" title="{label}">'
            f"{image(data, name)}</button>"
        )
    return f'<div class="shown thumbs">{"".join(buttons)}</div>'


def painter_html(view, grid):
    """The picture under its mask, to draw on."""
    visible, cells = set(view.visible), []
    for patch in range(grid[0] * grid[1]):
        state = ("visible", "true") if patch in visible else ("", "false")
        row, column = divmod(patch, grid[1])
        cells.append(
            f'<span class="{state[0]}" data-patch="{patch}" role="button" tabindex="0" '
            f'aria-pressed="{state[1]}" aria-label="patch {row + 1}, {column + 1}"></span>'
        )
    style = f"grid-template: repeat({grid[0]}, 1fr) / repeat({grid[1]}, 1fr)"
    # Painting changes the page alone. So a mask that was sent before must differ when sent again.
    new = f'data-time="{time.monotonic_ns()}"'
    return (
        f'<div class="shown painter" {new}>{image(view.picture, "the picture")}'
        f'<div class="cells" style="{style}">{"".join(cells)}</div></div>'
    )


def mask_note(view, n_patches):
    """How much is visible, and whether the network knows such masks."""
    share = 1 - len(view.visible) / n_patches
    text = f"{len(view.visible)} of {n_patches} patches are visible, {share:.0%} are masked."
    if abs(share - USUAL_RATIO) > FAR:
        text += f" Training usually masks {USUAL_RATIO:.0%}: this mask is far from what the "
        text += "network was trained on, and completions may be worse than they could be."
    return f'<p class="shown faint">{text}</p>'


def tile(cell, caption, *, code=None, badge="", classes=""):
    """A picture with a caption; with a code's number, one to choose."""
    attributes = "" if code is None else f' data-code="{code}" role="button" tabindex="0"'
    mark = f'<span class="badge">{badge}</span>' if badge else ""
    return (
        f'<figure class="{classes}"{attributes}>{mark}{image_of(cell, caption)}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def grid_html(done, explorer, order, chosen):
    """All completions in an order, with their losses. chosen: the codes A, B and C; None where none
    can be chosen."""
    nearest = done.nearest()
    alone = "" if done.plain_loss is None else f"<br>loss {done.plain_loss:.3f}"
    first = [
        tile(done.image, "the image"),
        tile(done.masked, "what the network sees"),
        tile(done.plain, f"without code, as an MAE{alone}", classes="plain"),
    ]
    tiles = []
    for code in (code for code in order if code < len(done.cells)):
        loss = f"<br>loss {done.losses[code]:.3f}" if done.losses else ""
        star = "<br>★ IMLE’s choice" if code == nearest else ""
        badge = LETTERS[chosen.index(code)] if code in (chosen or ()) else ""
        classes = " ".join(["nearest"] * (code == nearest) + ["chosen"] * bool(badge))
        caption = f"code {code + 1}{loss}{star}"
        number = None if chosen is None else code
        tiles.append(tile(done.cells[code], caption, code=number, badge=badge, classes=classes))
    text = f"{len(tiles)} codes of {explorer.code_dim} random numbers, one completion each."
    text += " ★ is nearest to the image: of these codes, IMLE would train this one. Loss: squared"
    text += " error of the masked patches; lower is nearer."
    if not explorer.code_dim:
        text = "This model has no codes: its one completion is an average of all possible ones."
    if done.plain_loss is None:
        text += " Nothing is masked, so there is nothing to complete."
    text += " Visible patches are pasted in." + NORMALIZED * explorer.config.norm_pix_loss
    return (
        f'<div class="shown"><div class="tiles first">{"".join(first)}</div>'
        f'<div class="tiles">{"".join(tiles)}</div><p class="faint">{text}</p></div>'
    )


def histogram_html(done, bins=16):
    """How the losses of the codes are spread, beside the loss without code."""
    if len(done.losses) < 2:
        return ""
    low, high = min([*done.losses, done.plain_loss]), max([*done.losses, done.plain_loss])
    span = (high - low) or 1
    counts = [0] * bins
    for loss in done.losses:
        counts[min(bins - 1, int((loss - low) / span * bins))] += 1
    parts, names = [], []
    for number, count in enumerate(counts):
        height = 70 * count / max(counts)
        parts.append(
            f'<rect x="{20 + number * 600 / bins:.1f}" y="{80 - height:.1f}" height="{height:.1f}" '
            f'width="{600 / bins - 2:.1f}" fill="currentColor" opacity=".35"/>'
        )
    mean = sum(done.losses) / len(done.losses)
    marks = {"nearest code": min(done.losses), "without code": done.plain_loss, "mean": mean}
    for (name, loss), colour in zip(marks.items(), ("#d98a00", "#b8559a", "#3b82d6"), strict=True):
        x = 20 + (loss - low) / span * 600
        parts.append(f'<path d="M{x:.1f} 0V84" stroke="{colour}" stroke-width="3"/>')
        names.append(f'<b style="color: {colour}">▎</b>{name} {loss:.3f}')
    return (
        f'<svg class="histogram" viewBox="0 0 640 86" role="img" aria-label="losses of the codes">'
        f'{"".join(parts)}</svg><p class="faint">The codes’ losses, from {min(done.losses):.3f} to '
        f"{max(done.losses):.3f}: {', '.join(names)}</p>"
    )


def walk_html(frames):
    """Frames from code A to code B, with a slider."""
    strip = "".join(image_of(frame) for frame in frames)
    return (
        '<div class="shown walk"><div class="top">'
        f"{image_of(frames[0]).replace('<img', '<img class=frame')}"
        '<span class="way"><b>A</b><input type="range" min="0" '
        f'max="{len(frames) - 1}" value="0" aria-label="from code A to code B"><b>B</b></span>'
        "</div>"
        f'<div class="strip">{strip}</div></div>'
    )


def plane_html(cells):
    """Completions on the plane through three codes."""
    corners = {0: "A", PLANE - 1: "B", PLANE * (PLANE - 1): "C"}
    parts = [
        f"<span>{image_of(cell)}"
        + (f'<span class="badge">{corners[n]}</span>' if n in corners else "")
        + "</span>"
        for n, cell in enumerate(cells)
    ]
    style = f"grid-template-columns: repeat({PLANE}, 1fr)"
    return f'<div class="shown plane" style="{style}">{"".join(parts)}</div>'


def deviation_html(done):
    """Where codes differ, laid over the picture."""
    deviation = done.deviation()
    return (
        f'<div class="shown"><div class="two">{image_of(done.image)}'
        f"{image_of(overlay(done.image, deviation), 'deviation over codes')}</div>"
        '<p class="faint">Dark: all codes agree. Bright: codes differ, by a standard deviation of '
        f"up to {deviation.max():.2f} (black to white is 1).</p></div>"
    )
