"""How often does `view: auto` find the view that a teacher was trained with?

    python benchmarks/view.py --data cifar10 --model tiny16 --model resnet8 --images 20000 --epochs 3
    python benchmarks/view.py --teacher teacher.safetensors --trained zeros

Teaches each model under each of four views, then prints the distance of drawn pictures from its BatchNorm statistics
under every candidate, and the one that `auto` takes. With --teacher it looks at a teacher that is there already.
"""

from __future__ import annotations

import argparse

import torch

from dodistill.config.tree import ViewConfig
from dodistill.data.images import load_images
from dodistill.engine.teach import Teach, teach
from dodistill.engine.view import candidates, mismatch
from dodistill.models import load_model
from dodistill.models.teacher import Teacher

VIEWS = {
    "zeros": {"padding": "zeros"},
    "reflect": {"padding": "reflect"},
    "none": {"pad": 0},
    "resized": {"crop": "resized"},
}


def line(name: str, trained: str, teacher: Teacher) -> bool:
    """Print one row of the table; whether `auto` is right."""
    found = candidates(ViewConfig(crop="auto", padding="auto"), teacher.image_shape)
    scores = {k: mismatch(v, teacher) for k, v in found.items()}
    chosen = min(scores, key=lambda k: scores[k])
    cells = " | ".join(f"{v:.1f}" for v in scores.values())
    print(f"| {name} | {trained} | {cells} | {chosen}{'' if chosen == trained else ' (wrong)'} |", flush=True)
    return chosen == trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--teacher", action="append", default=[], help="a .safetensors that dodistill wrote")
    parser.add_argument("--trained", default="zeros", help="the view of the teachers given by --teacher")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        "| teacher | trained with | zeros | reflect | none | resized | auto takes |\n|---|---|---:|---:|---:|---:|---|"
    )
    right = []
    for file in args.teacher:
        model = load_model(file)
        spec = model.spec
        shape = (int(spec["in_channels"]), int(spec["image_size"]), int(spec["image_size"]))
        right.append(line(file, args.trained, Teacher(model, shape)))
    if args.model:
        images = load_images(args.data)
        images = images.select(torch.arange(min(args.images, len(images))))
    for name in args.model:
        for trained, how in VIEWS.items():
            model = load_model(name, num_classes=images.num_classes, in_channels=images.image_shape[0],
                               image_size=images.image_shape[1], mean=args.data, seed=0)  # fmt: skip
            teach(model, images, None, Teach(model=name, epochs=args.epochs, precision="fp32", **how))  # type: ignore[arg-type]
            right.append(line(name, trained, Teacher(model, images.image_shape)))
    print(f"\nright in {sum(right)} of {len(right)}")


if __name__ == "__main__":
    main()
