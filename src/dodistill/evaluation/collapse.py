"""Detection of collapse.

A collapsed generator makes one class, or one picture. A student that learns nothing agrees with its teacher by chance.
All three are detected early in a run, and without labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Thresholds of collapse.
FEW_CLASSES = 0.3  #: effective classes of the newest inputs, as a share of all
SAME_PICTURE = 0.02  #: standard deviation of a pixel over the newest inputs, of [0, 1]
CHANCE = 2.0  #: agreement, in multiples of chance
ENOUGH = 20  #: inputs per class from which a class without any counts as absent
WARM = 0.2  #: share of the run after which absent classes are a symptom
PATIENCE = 0.5  #: share of the run after which low agreement is a symptom


@torch.no_grad()
def vital_signs(images: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Of the newest inputs [n, C, H, W] (float in [0, 1] or uint8) and the teacher's logits [n, K]; unsynced scalars.

    effective_classes: exp(entropy) of the class histogram of the teacher's predictions, in [1, K].
    diversity: standard deviation of a pixel over the inputs, mean over pixels, in [0, 0.5].
    confidence: the teacher's mean largest probability, in [1/K, 1].
    absent_classes: number of classes without inputs; only where there are `ENOUGH` inputs per class.
    """
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    share = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float().mean(0)
    signs = {
        "effective_classes": torch.special.entr(share).sum().exp(),
        "diversity": x.std(0, correction=0).mean(),
        "confidence": logits.softmax(1).amax(1).mean(),
    }
    if len(logits) >= ENOUGH * logits.shape[1]:
        signs["absent_classes"] = (share == 0).sum().float()
    return signs


def symptoms(
    signs: dict[str, float], classes: int, agreement: float | None = None, done: float = 0.0
) -> dict[str, str]:
    """Symptom -> a sentence that names it and the settings to change. Empty without symptoms.

    Args:
        signs: the values of `vital_signs`.
        classes: K.
        agreement: with the teacher on held-back inputs, in percent; None: not known yet.
        done: share of the run that is done.
    """
    found: dict[str, str] = {}
    effective, diversity = signs.get("effective_classes"), signs.get("diversity")
    if effective is not None and classes > 2 and effective < max(FEW_CLASSES * classes, 1.5):
        evenly = "" if signs.get("absent_classes") else ", or draw evenly with --intervention stratified"
        found["few classes"] = (
            f"the newest inputs have {effective:.1f} effective classes of {classes}. Raise the source's weight of "
            "class balance or its batch (see `dodistill distill --source NAME --help`; for dafl, adversarial and pre "
            f"--source.coverage 5){evenly}."
        )
    absent = signs.get("absent_classes", 0)
    if absent and done >= WARM and "few classes" not in found:
        found["absent classes"] = (
            f"{absent:.0f} of {classes} classes are absent from the newest inputs, so the student cannot learn them. "
            "Raise the source's weight of class balance (for dafl, adversarial and pre --source.coverage 5), train the "
            "generator faster (as by --source.lr_g, --source.warmup), or use other unlabelled images."
        )
    if diversity is not None and diversity < SAME_PICTURE:
        found["same picture"] = (
            f"the newest inputs are nearly equal (standard deviation of a pixel {diversity:.3f}, in [0, 1]). Lower the "
            "source's learning rate (as --source.lr_g), or raise its batch."
        )
    if agreement is not None and done >= PATIENCE and agreement < CHANCE * 100 / classes:
        found["no agreement"] = (
            f"after {100 * done:.0f} % of the steps the student agrees with the teacher on {agreement:.1f} % of the "
            f"held-back inputs; chance is {100 / classes:.1f} %. Check samples.png and the class shares; lower "
            "--optim.lr; or try another source."
        )
    return found
