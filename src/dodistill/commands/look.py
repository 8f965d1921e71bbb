"""`dodistill look`: compares runs on real images. KDCI's Figures 1, 5 and 6.

Figure 1: the Frechet distance between substitution data and real images, and the class shares of both.
Figure 5: t-SNE of each network's penultimate features, and the silhouette of the classes in them.
Figure 6: the images on which only one of two students is right.

Deviations. (1) The paper's distance is the FID, in the features of an ImageNet network. Ours is in the features of the
run's own teacher: it needs no download and fits images of 16 or 32 pixels, but compares only runs of one teacher.
(2) We add the distance between two halves of the real images, of the same size: the value without any shift.
(3) A map of points is easily misread. The silhouette (Rousseeuw 1987, from -1 to 1, in the space of the features)
measures the separation of the classes as a number. (4) The paper shows the images that +KDCI corrects. We also show
the images that become wrong, and count both.

No choice depends on the labels. `compare` deletes the pool of a run, and keeps 10 000 of its images for this page (at
most 32 MB).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..config.tree import Model
from ..data.classes import require_count, titles
from ..data.images import Images, refuse_one_class, require_fit
from ..data.labels import fitted
from ..data.packed import Packed, open_images
from ..engine.inputs import POOL_MOST, read_pool
from ..engine.run_folder import check_writable, names_of_run
from ..errors import DodistillError
from ..evaluation.evaluate import agreement, class_shares, frechet_distance, predict, top1
from ..evaluation.probe import features
from ..models.normalized import class_names
from ..report import plots
from ..report.canvas import Plot
from ..report.format import number
from ..report.images import grid
from ..report.page import render, write_figures
from ..report.progress import Progress
from .finished import opened


@dataclass(frozen=True)
class Arguments:
    """Compare runs on real images: the distance of their data, the students' features, and where students differ."""

    runs: Annotated[tuple[str, ...], "[RUN ...]"] = ()  #: run folders of one teacher
    test: Annotated[str, "DATA"] = ""  #: labelled images: .npz, folder, or a data set's name; required
    teacher: Model = field(default_factory=Model)  #: the teacher, if a run received it in memory
    model: Annotated[str, "FILE.py:FACTORY"] = ""  #: the students' network, if their weights name code, or nothing
    allow_code: bool = False  #: allow the code that the runs name as their networks to run
    classes: Annotated[str, "FILE"] = ""  #: names of its classes, one a line, or cat,dog,...; empty: as its weights say
    n: int = 1000  #: points in each map
    out: Annotated[str, "FILE"] = "look.html"  #: the page


def run(arguments: Arguments) -> int:
    if not arguments.runs or not arguments.test:
        raise DodistillError("look needs run folders and labelled images: dodistill look RUN [RUN ...] --test DATA.")
    a = arguments
    found = look(a.runs, a.test, a.out, a.teacher, a.n, a.classes, a.model, a.allow_code)
    wide = max(len(s.name) for s in found)
    print(f"{'':{wide}}  accuracy  silhouette  distance of its data (between real halves)")
    for s in found:
        far = "" if s.distance is None or s.floor is None else f"{number(s.distance, 3)} ({number(s.floor, 3)})"
        print(f"{s.name:{wide}}  {s.accuracy:7.2f}%  {s.silhouette:10.3f}  {far}".rstrip())
    print(arguments.out)
    return 0


SHOWN = 12  #: images shown of each kind of difference


@dataclass
class Seen:
    """One network on the page."""

    name: str
    accuracy: float  #: % of the real images
    silhouette: float  #: of the classes in its penultimate features, -1..1
    map: Plot
    agreement: float | None = None  #: % of the real images on which it predicts the teacher's class
    distance: float | None = None  #: from its pool to the real images, in its teacher's features
    floor: float | None = None  #: between two halves of the real images
    images: int = 0  #: on each side of the distance
    samples: str = ""  #: of the pool, a data URI
    shares: Plot | None = None


@dataclass
class Differ:
    """The real images on which only one of two students is right."""

    name: str
    counts: tuple[int, int]  #: right only in the first run, right only in this one
    images: tuple[list[tuple[str, str]], list[tuple[str, str]]]  #: (data URI, caption), the clearest cases first


def look(
    runs: Sequence[str | Path], test: str, out: str | Path, teacher: str | Model = "", n: int = 1000, classes: str = "",
    network: str = "", allow_code: bool = False,
) -> list[Seen]:  # fmt: skip
    """Write the page `out` about these run folders and the labelled images `test`; the maps have `n` points.

    Each figure is also written to `figures/` beside the page (page.py). `teacher` is needed for a run that was given
    its teacher in memory, `classes` (a file or a list of names) if neither teacher nor run knows the
    names of the classes, `network` (a spec) for students whose weights name code or nothing, unless `allow_code` lets
    the code that runs name run. The teacher is first in the returned list. Raises DodistillError for missing files, for
    images without labels, and for runs of several teachers.
    """
    check_writable(Path(out))
    tsne, silhouette = _sklearn()
    folders = [Path(r) for r in runs]
    if n < 50:
        raise DodistillError(f"--n is {n}; a map needs at least 50 points.")
    have = opened(folders, teacher, network, allow_code, classes)
    model, shape, students = have.teacher, have.shape, have.students
    outputs = model.spec["num_classes"]
    names = class_names(model) or names_of_run(folders[0])
    require_count(names, outputs, "classes")
    real = open_images(test, "test", True, shape, have.configs[0].data.crop_share)
    if real.y is None or len(real) < 50:
        raise DodistillError(f"{test} needs labels, and at least 50 images (it has {len(real)}).")
    refuse_one_class(real, test)
    real = fitted(real, names, outputs, test)
    require_fit(real, shape, outputs or 1 << 31, test)
    called = titles(names)
    notes = ([real.note] if real.note else []) + have.notes
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    some, real = real.select(order[:n]), real.select(order)
    assert some.y is not None
    assert real.y is not None
    y = some.y

    def seen(name: str, logits: Tensor, inner: Tensor) -> Seen:
        f = inner.cpu().numpy()
        flat = tsne(n_components=2, init="pca", perplexity=min(30, (len(y) - 1) / 3), random_state=0).fit_transform(f)
        label = f"t-SNE of the features of {name} on {len(y)} real images, coloured by class"
        points = plots.points(f"map-{name}", flat[:, 0], flat[:, 1], y.tolist(), label=label, names=called)
        return Seen(name, top1(logits, real.y), float(silhouette(f, y.numpy())), points)  # type: ignore[arg-type]

    with Progress(1 + len(folders), f"look at {len(folders)} runs on {len(real):,} images") as progress:
        answers = [predict(model, real.x)]
        inside = features(model, real.x[: max(2 * POOL_MOST, n)])
        found = [seen("teacher", answers[0], inside[: len(y)])]
        progress.update(1)
        for i, (folder, student) in enumerate(zip(folders, students), 2):
            answers.append(predict(student, real.x))
            found.append(seen(folder.name, answers[-1], features(student, some.x[:])))
            found[-1].agreement = agreement(answers[-1], answers[0])
            _shift(found[-1], folder, model, inside, real, called)
            progress.update(i)
    differ = [_differ(f.name, real, answers[1], a, called) for f, a in zip(folders[1:], answers[2:])]
    page = render(
        "look.html.j2", Path(out), seen=found, differ=differ, first=folders[0].name, real=_uri(real.x[:32], 8),
        test=test, count_real=len(real), points=len(y), notes=notes,
    )  # fmt: skip
    write_figures(page, (plot for s in found for plot in (s.shares, s.map)))
    return found


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise DodistillError("the maps need scikit-learn (t-SNE): pip install 'dodistill[demo]'") from error
    return TSNE, silhouette_score


def _shift(
    it: Seen, folder: Path, teacher: nn.Module, inside: Tensor, real: Images | Packed, names: Sequence[str]
) -> None:
    """Fill in the distance from the pool of a run to the real images, if the pool or a sample of it still exists."""
    pool = read_pool(folder)
    if pool is None:
        return
    half = len(inside) // 2
    it.images = m = min(len(pool["x"]), half, POOL_MOST)
    drawn = torch.randperm(len(pool["x"]), generator=torch.Generator().manual_seed(0))[:m]
    it.distance = frechet_distance(features(teacher, pool["x"][drawn]), inside[:m])
    it.floor = frechet_distance(inside[half : half + m], inside[:m])
    it.samples = _uri(pool["x"][drawn[:32]], 8)
    assert real.y is not None
    classes = pool["logits"].shape[1]
    true = torch.bincount(real.y, minlength=classes).float() / len(real)
    groups = [("pool", class_shares(pool["logits"]).tolist()), ("real", true.tolist())]
    even = ("even", 1 / classes)
    it.shares = plots.bars(f"class-shares-{it.name}", groups, x_label="class", reference=even, names=names)


def _differ(name: str, real: Images | Packed, a: Tensor, b: Tensor, names: Sequence[str]) -> Differ:
    """a, b: logits [n, K] of two students on the same images; `names` of the K classes, where they are known."""
    assert real.y is not None
    y = real.y.to(a.device)
    right = [v.argmax(1) == y for v in (a, b)]
    sure = [v.softmax(1).gather(1, y[:, None])[:, 0] for v in (a, b)]
    counts, shown = [], []
    for mine in (0, 1):
        alone = right[mine] & ~right[1 - mine]
        lead = torch.where(alone, sure[mine] - sure[1 - mine], -torch.inf)
        top = lead.argsort(descending=True, stable=True)[: min(SHOWN, int(alone.sum()))].tolist()
        counts.append(int(alone.sum()))
        pairs = [(int(y[i]), int((b, a)[mine][i].argmax())) for i in top]
        said = [f"{names[k] if names else k}, not {names[other] if names else other}" for k, other in pairs]
        shown.append([(_uri(real.x[i : i + 1], 1), text) for i, text in zip(top, said)])
    return Differ(name, (counts[0], counts[1]), (shown[0], shown[1]))


def _uri(x: Tensor, columns: int) -> str:
    data = io.BytesIO()
    grid(x, columns).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
