"""`dodistill pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..config import flags
from ..data.pack import pack
from ..errors import DodistillError
from ..report.format import count
from ..report.progress import Progress


@dataclass(frozen=True)
class Arguments:
    """Decode many images once, into one file of rows that need not fit into memory. Rerun it to go on.

    examples:
      dodistill pack imagenet/ imagenet_train.npy --image-shape 3,224,224
      dodistill pack "shards/{000..127}.tar" web.npy --image-shape 3,224,224
      dodistill pack hf:OWNER/NAME name.npy --image-shape 3,64,64
    """

    images: Annotated[str, "SRC"]  #: a folder, WebDataset .tar files (also at a URL), or hf:OWNER/NAME
    out: Annotated[str, "OUT.npy"]  #: the file to write
    image_shape: Annotated[str, "C,H,W"] = ""  #: channels, height and width of the rows
    split: Literal["train", "test"] = "train"  #: of a folder with subfolders of these names, or of a data set
    no_labels: bool = False  #: keep no classes
    crop: float = 0.0  #: centre crop / short side; 0: train 1, test 0.875 from 160 pixels on, else 1
    workers: int = 0  #: threads that decode; 0: one for each core


def run(arguments: Arguments) -> int:
    if not arguments.image_shape:
        raise DodistillError("images are resized to one shape; give --image-shape C,H,W, as in 3,224,224.")
    shape = flags.shape(arguments.image_shape)
    assert shape is not None
    with Progress(0, f"packing {arguments.images}") as progress:
        done = pack(
            arguments.images, arguments.out, shape, arguments.split, not arguments.no_labels, arguments.crop,
            arguments.workers, lambda n, total: progress.inner("images", n, total),
        )  # fmt: skip
    size = Path(done.path).stat().st_size / 1e9
    print(f"{count(done.rows)} images in {done.path}, {size:.3g} GB, {'with' if done.labelled else 'without'} labels")
    if done.skipped:
        print(f"skipped {count(done.skipped)} that are broken or no images: {', '.join(done.first)}")
    return 0
