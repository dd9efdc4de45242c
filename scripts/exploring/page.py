"""What the page of scripts/explore.py does, without gradio: the pictures to pick from, the parts of
the page for a view, and what events make of a view."""

import contextlib
import html
import secrets
import tempfile
import threading
import time
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from complete import fitted_picture, open_picture

import Data
from internals.plots import NORMALIZED, picture_grid
from internals.stores import ImageError
from Utils import InputError, permutation

from .completions import (
    FRAMES,
    PLANE,
    animation,
    overlay,
    picture_of,
    plane_weights,
    silent,
    walk_weights,
)
from .pieces import (
    THUMBS,
    deviation_html,
    grid_html,
    histogram_html,
    mask_note,
    plane_html,
    walk_html,
)
from .views import (
    MOST_CODES,
    USUAL_RATIO,
    View,
    block_mask,
    centre_mask,
    command_of,
    decoded,
    encoded,
    open_upload,
    random_mask,
    read_settings,
)

FIRST_MASKS = 6  # masks of each thumbnail from which the first view is chosen


class Library:
    """The pictures of a data set, in a random order, so that classes mix, or the files of the
    command line; fitted to the model's size."""

    def __init__(self, paths, size):
        self.size, self.paths, self.images = size, paths, None
        path = Path(paths[0]).expanduser()
        if len(paths) == 1 and (path.is_dir() or path.suffix in (".tar", ".lmdb")):
            self.images = Data.open_images(path)
            self.places = permutation(len(self.images), 0).tolist()
        else:
            for path in paths:
                open_picture(path)  # an InputError for a file that is no picture
        self.encoded = lru_cache(256)(self._encoded)

    def __len__(self):
        return len(self.paths if self.images is None else self.images)

    def readable(self, first):
        """The indices, of THUMBS from `first` on, of pictures that are not damaged."""
        found = []
        for index in range(first, min(first + THUMBS, len(self))):
            with contextlib.suppress(InputError):
                self.encoded(index)
                found.append(index)
        return found

    def name(self, index):
        """The path of a file, or the name of a picture in a data set."""
        if self.images is None:
            return str(self.paths[index])
        return self.images.name(self.places[index])

    def path(self, view):
        """The path of a view's picture if it came from the command line; else None."""
        is_file = self.images is None and view.name in self.paths
        if is_file and self.encoded(self.paths.index(view.name)) == view.picture:
            return view.name
        return None

    def _encoded(self, index):
        """The picture as a PNG in base64; an InputError if it is damaged."""
        try:
            picture = (
                open_picture(self.paths[index])
                if self.images is None
                else self.images.load(self.places[index]).convert("RGB")
            )
        except ImageError as error:
            raise InputError(str(error)) from None
        return encoded(fitted_picture(picture, self.size))


class Page:
    """What the page's parts show for a View."""

    def __init__(self, library, explorers):
        self.library, self.explorers = library, explorers
        self.main = explorers[0]
        self.size, self.grid = self.main.config.image_size, self.main.config.grid
        self.n_patches = self.main.n_patches
        self.busy = threading.Lock()  # held while models compute
        self.is_slow = False  # whether a change takes so long that people want to see progress

    def first_view(self):
        """The view that the page opens with."""
        compare = self.explorers[1].source if len(self.explorers) > 1 else ""
        views = [
            View(
                self.library.encoded(index),
                self.library.name(index),
                random_mask(self.n_patches, USUAL_RATIO, mask_seed),
                mask_seed=mask_seed,
                model=self.main.source,
                compare=compare,
            )
            for index in self.library.readable(0) or [0]  # [0]: the error says what is wrong
            for mask_seed in range(FIRST_MASKS)
        ]
        start = time.perf_counter()
        self.main.complete(views[0])
        seconds = time.perf_counter() - start
        self.is_slow = seconds > 0.5
        if seconds > 0.1 or not self.main.code_dim:
            return views[0]
        # Where that takes no time: the picture and mask whose completions differ most.
        return max(views, key=lambda view: self.main.complete(view).deviation().mean())

    def parts(self, view, progress):
        """The page's parts for a view, as HTML by name; the command as text. progress(done, total)
        is called as completions are done."""
        total, done = view.codes * len(self.explorers) + FRAMES, 0
        total += PLANE**2 * (len(view.chosen) > 2)

        def count(n):
            nonlocal done
            done += n
            progress(done, total)

        results = [explorer.complete(view, count) for explorer in self.explorers]
        chosen, order = self.chosen(view, results[0]), results[0].order(view.order)
        grids = []
        for explorer, result in zip(self.explorers, results, strict=True):
            name = f"<h4>{html.escape(explorer.source)}</h4>" if len(results) > 1 else ""
            grid = grid_html(result, explorer, order, chosen if explorer is self.main else None)
            grids.append(name + grid + histogram_html(result))
        return {
            "note": mask_note(view, self.n_patches),
            "grid": grids[0],
            "compared": grids[1] if grids[1:] else "",
            "walk": walk_html(self.walk(view, chosen, count)) if chosen[1:] else self.no_walk(),
            "plane": plane_html(self.plane(view, chosen, count)) if chosen[2:] else "",
            "deviation": deviation_html(results[0]) if self.main.code_dim else "",
            "command": self.command(view, results[0]),
        }

    def chosen(self, view, done):
        """The codes A, B and C; at first two very different ones."""
        return tuple(n for n in view.chosen or done.ends() if n < len(done.cells))

    def walk(self, view, chosen, progress=silent):
        """Frames from code A to code B."""
        return self.main.mixtures(view, chosen[:2], walk_weights(), progress)

    def plane(self, view, chosen, progress=silent):
        """Completions on the plane through A, B and C."""
        return self.main.mixtures(view, chosen, plane_weights(), progress)

    def command(self, view, done):
        """The command that draws the grid; "" if nothing is masked."""
        if done.plain_loss is None:
            return ""
        picture = self.library.path(view) or "picture.png"
        return command_of(view, done.order(view.order), picture, self.main.overrides)

    def no_walk(self):
        """What stands in place of a walk."""
        text = "choose two completions" if self.main.code_dim else "this model has no codes"
        return f'<p class="faint">No walk: {text}.</p>'

    def save(self, view, folder):
        """Writes what is shown to a new folder; returns the paths."""
        folder = Path(tempfile.mkdtemp(dir=folder))
        (folder / "view.json").write_text(view.to_json())
        decoded(view.picture).save(folder / "picture.png")
        results = [explorer.complete(view) for explorer in self.explorers]
        order = results[0].order(view.order)
        for done, name in zip(results, ("completions.png", "compared.png"), strict=False):
            first = torch.stack([done.image, done.masked, done.plain])
            numbers = [n for n in order if n < len(done.cells)]
            cells = torch.cat([first, done.cells[numbers]])
            headers = ["image", "masked", "no code", *(f"code {n + 1}" for n in numbers)]
            explorer = self.explorers[name == "compared.png"]
            caption = f"Completions by {explorer.source}."
            caption += NORMALIZED * explorer.config.norm_pix_loss
            picture_grid(cells[None], headers, caption).save(folder / name)
        done, chosen = results[0], self.chosen(view, results[0])
        picture_of(overlay(done.image, done.deviation())).save(folder / "deviation.png")
        if chosen[1:]:
            frames = self.walk(view, chosen)
            animation(frames, folder / "walk.webp")
            picture_grid(frames[None], [""] * len(frames), "From A to B.").save(folder / "walk.png")
        if chosen[2:]:
            cells = self.plane(view, chosen).unflatten(0, (PLANE, PLANE))
            picture_grid(cells, [""] * PLANE, "Through three codes.").save(folder / "plane.png")
        if command := self.command(view, done):
            (folder / "command.txt").write_text(command + "\n")
        paths = sorted(folder.iterdir())
        with zipfile.ZipFile(folder / "everything.zip", "w") as file:
            for path in paths:
                file.write(path, path.name)
        return [str(folder / "everything.zip"), *map(str, paths)]


class Changes:
    """What events make of a view. Values come from a browser: all are checked."""

    def __init__(self, page):
        self.page = page

    def pick(self, view, event):
        """Another picture of the library."""
        return self.of_library(view, number_of(event, "index", len(self.page.library)))

    def pick_random(self, view, event):
        """Any picture of the library."""
        return self.of_library(view, secrets.randbelow(len(self.page.library)))

    def of_library(self, view, index):
        """The picture with this index."""
        library = self.page.library
        return view.changed(picture=library.encoded(index), name=library.name(index), chosen=())

    def upload(self, view, event, path):
        """A picture that was sent."""
        picture = encoded(fitted_picture(open_upload(path), self.page.size))
        return view.changed(picture=picture, name=Path(path).name, chosen=())

    def reopen(self, view, event, path):
        """Settings that were saved; the models stay."""
        new = read_settings(path, self.page.size, self.page.n_patches)
        return new.changed(model=view.model, compare=view.compare)

    def paint(self, view, event):
        """The mask that was drawn."""
        visible = event._data.get("visible") if isinstance(event._data, dict) else None
        allowed = range(self.page.n_patches)
        is_list = isinstance(visible, list) and all(type(n) is int for n in visible)
        if not is_list or not set(visible) <= set(allowed):
            raise InputError(f"a mask is a list of patches from 0 to {allowed[-1]}")
        return view.changed(visible=tuple(sorted(set(visible))))

    def random_mask(self, view, event, ratio):
        """A random mask of another ratio, with the same seed."""
        ratio = min(1.0, max(0.0, ratio))
        visible = random_mask(self.page.n_patches, ratio, view.mask_seed)
        return view.changed(visible=visible, ratio=ratio)

    def mask(self, name, view, event):
        """The mask of a button."""
        n_patches, grid = self.page.n_patches, self.page.grid
        seed = secrets.randbelow(2**31)
        masks = {
            "random": lambda: random_mask(n_patches, view.ratio, seed),
            "block": lambda: block_mask(grid, seed),
            "centre": lambda: centre_mask(grid),
            "show all": lambda: tuple(range(n_patches)),
            "hide all": lambda: (),
        }
        return view.changed(visible=masks[name](), mask_seed=seed)

    def draw(self, view, event):
        """New codes."""
        return view.changed(seed=secrets.randbelow(2**31), chosen=())

    def count(self, view, event, codes):
        """More or fewer codes."""
        codes = min(MOST_CODES, max(1, int(codes)))
        return view.changed(codes=codes, chosen=tuple(n for n in view.chosen if n < codes))

    def order(self, view, event, order):
        """Another order."""
        return view.changed(order=order)

    def choose(self, view, event):
        """Chooses a code, or gives it up; of more than three the first goes."""
        done = self.page.main.complete(view)
        code = number_of(event, "code", len(done.cells))
        chosen = self.page.chosen(view, done)
        chosen = tuple(n for n in chosen if n != code) if code in chosen else (*chosen, code)
        return view.changed(chosen=chosen[-3:])


def number_of(event, name, count):
    """The number in an event of the page; an InputError if it is not below count."""
    number = event._data.get(name) if isinstance(event._data, dict) else None
    if type(number) is not int or not 0 <= number < count:
        raise InputError(f"no such {name}")
    return number
