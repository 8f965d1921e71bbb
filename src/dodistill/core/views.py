"""The views of a pool's images: the student's augmented inputs, and the teacher's logits of each view.

A run draws an image of the pool up to hundreds of times. With `augment.views = V` the teacher's logits of V views are
computed once, when an image enters the pool, and no step of the student calls the teacher. With V = 0 each draw is a
new view, and each step calls the teacher.

Shifts by up to p pixels and flips give 2 (2p + 1)^2 views, 162 at p = 4. A V of that number or more stores each of them
once. A draw then has the distribution of a new view, and the student loses nothing but the rounding of the logits. If
all do not fit in the memory, each draw is a new view, not one of those that fit. Resized crops (`augment.crop`) are not
stored: each draw is a new one.

With `augment.mix`, some views are blends with another image. With V = 0, that image is another one of the batch. A
stored blend keeps its partner, an image that is in the pool when the view is drawn. Once the partner has left the pool,
the view is drawn anew.

FKD (Shen and Xing, ECCV 2022) stores the teacher's predictions for crops in the same way, but only the largest few
probabilities of each. Here all logits are stored, in fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config.tree import Augment
from ..functional.augment import mix_weights, resized_part, shift_draws, shift_flip, to_float
from .pool import Pool
from .ranks import Ranks
from .runtime import at_once, restore_stream

#: Bytes beside the logits of a view: two shifts (int16) and whether it is mirrored.
_DRAW = 5
#: Further bytes of a view that may be a blend: the same of the partner, its slot (int32), four draws (fp32).
_BLEND = _DRAW + 4 + 16


class Views:
    """The views of the images in `pool`. Each belongs to a slot, and is drawn anew when the slot gets another image.

    Attributes:
        count: V, the views of each image with stored logits; 0: new views at each draw.
        reason: the reason for V in one sentence, for the summary.
        t: fp16 [slots, V, K], the teacher's logits of the views.

    Args:
        pool: the pool of the images.
        augment: the student's augmentation, with `views`, the requested V, and `views_gb`, its memory limit.
        generator: the stream that the views are drawn from, on the pool's device.
    """

    def __init__(self, pool: Pool, augment: Augment, generator: torch.Generator) -> None:
        self.pool, self.augment, self.generator = pool, augment, generator
        self.count = 0
        self.reason = ""
        #: how many views of an image there are; no limit with blends and resized crops
        self.all = math.inf if augment.mixes or augment.resizes else (2 * augment.pad + 1) ** 2 * (1 + augment.flip)
        device, K, S = pool.device, pool.num_classes, 1 + augment.mixes  # S images are visible in a view
        self.shift = torch.empty(0, 0, S, 2, dtype=torch.int16, device=device)
        self.mirrored = torch.empty(0, 0, S, dtype=torch.bool, device=device)
        self.t = torch.empty(0, 0, K, dtype=torch.float16, device=device)
        # of blends only: the partner's slot, and the draws of the weights (`mix_weights`)
        self.partner = torch.empty(0, 0, dtype=torch.int32, device=device)
        self.u = torch.empty(0, 0, 4, device=device)

    def _reserve(self, slots: int) -> None:
        """Allocate `slots` images (growing by doubling, up to the pool's capacity); the contents stay."""
        have = len(self.t)
        if have >= slots:
            return
        new = min(self.pool.capacity, max(slots, 2 * have))

        def longer(old: Tensor) -> Tensor:
            fresh = old.new_empty(new, self.count, *old.shape[2:])
            fresh[:have] = old
            return fresh

        self.shift, self.mirrored, self.t = longer(self.shift), longer(self.mirrored), longer(self.t)
        if self.augment.mixes:
            self.partner, self.u = longer(self.partner), longer(self.u)

    def plan(self, draws: float, most: int, asked_each_time: bool = False) -> None:
        """Decide on V, once, before the first image enters the pool.

        Args:
            draws: average number of draws of one image in the run.
            most: largest number of images in the pool.
            asked_each_time: whether each batch needs a teacher pass anyway, for its features.
        """
        wanted, a = self.augment.views, self.augment
        each = self.pool.num_classes * 2 + _DRAW + (_BLEND if a.mixes else 0)
        fit = math.floor(a.views_gb * 1e9 / (max(most, 1) * each))
        V = int(min(wanted, fit, self.all))
        blends = f", some of them blended ({a.mix})" if a.mixes else ""
        if not (a.moves or a.mixes):
            self.reason = "without augmentation an image has one view, with teacher logits computed once"
        elif a.resizes:
            self.reason = f"new views at each draw{blends}, each with a teacher pass (resized crops are not stored)"
        elif not wanted:
            self.reason = f"new views at each draw{blends}, each with a teacher pass (augment.views is 0)"
        elif asked_each_time:
            self.reason = "new views at each draw: the criterion or an intervention reads the teacher's features"
        elif V < 1:
            self.reason = f"new views at each draw: one per image does not fit in augment.views_gb = {a.views_gb:g} GB"
        elif wanted >= self.all > fit:
            self.reason = (
                f"new views at each draw: all {self.all} of an image do not fit in augment.views_gb = {a.views_gb:g} GB"
            )
        elif draws < V:
            self.reason = f"new views at each draw: an image is drawn {draws:.3g} times, which is less than {V} views"
        else:
            self.count = V
            which = f"all {V} views" if self.all == V else f"{V} view{'s' * (V > 1)}"
            short = (
                f"; {wanted} do not fit in augment.views_gb = {a.views_gb:g} GB"
                if V == fit < min(wanted, self.all)
                else ""
            )
            self.reason = (
                f"teacher logits are computed once for {which} of each image{blends} "
                f"({V * each * most / 1e6:.3g} MB), and an image is drawn {draws:.3g} times{short}"
            )
            self.shift, self.mirrored, self.t, self.partner, self.u = (
                v.new_empty(0, V, *v.shape[2:]) for v in (self.shift, self.mirrored, self.t, self.partner, self.u)
            )

    @torch.no_grad()
    def fill(self, slots: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw the views of the new images in `slots` (long [n]), and store the teacher's logits of them, `ask(views)`.

        Older images get new views in place of those whose partner was one of the images that left these slots.
        Returns whether all logits are finite in fp16, as an unsynced bool scalar.
        """
        sound = torch.ones((), dtype=torch.bool, device=self.pool.device)
        if not self.count or not len(slots):
            return sound
        self._reserve(len(self.pool))
        index = slots.repeat_interleave(self.count)
        view = torch.arange(self.count, device=slots.device).repeat(len(slots))
        self._draw(index, view)
        if self.augment.mixes:
            others = self._orphans(slots)
            self._draw(*others)
            index, view = torch.cat([index, others[0]]), torch.cat([view, others[1]])
        most = max(1, at_once(self.pool.device, 1000) // self.count) * self.count
        for i, v in zip(index.split(most), view.split(most)):
            answers = ask(self._pixels(i, v)).to(torch.float16)
            sound &= torch.isfinite(answers).all()
            self.t[i, v] = answers
        return sound

    def _draw(self, index: Tensor, view: Tensor) -> None:
        """Draw view `view` [n] of the images in slots `index` [n] anew, with a partner among all images of the pool.

        Where all views are stored, the number of a view says its shift and whether it is mirrored.
        """
        pad, n, g, device = self.augment.pad, len(index), self.generator, self.pool.device
        S = self.shift.shape[2]
        if self.count == self.all:
            side = 2 * pad + 1
            place = view % side**2
            self.shift[index, view, 0] = torch.stack([place // side - pad, place % side - pad], 1).to(torch.int16)
            self.mirrored[index, view, 0] = view >= side**2
            return
        shift = torch.randint(-pad, pad + 1, (n, S, 2), device=device, generator=g)
        self.shift[index, view] = shift.to(torch.int16)
        self.mirrored[index, view] = (torch.rand((n, S), device=device, generator=g) < 0.5) & self.augment.flip
        if self.augment.mixes:
            partner = torch.randint(len(self.pool), (n,), device=device, generator=g)
            self.partner[index, view] = partner.to(torch.int32)
            self.u[index, view] = torch.rand((n, 4), device=device, generator=g)

    def _orphans(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(index, view) of the views of other images whose partner was in one of `slots`."""
        new = torch.zeros(len(self.pool), dtype=torch.bool, device=self.pool.device)
        new[slots] = True
        blended = self.u[: len(new), :, 0] < self.augment.mix_share
        index, view = (new[self.partner[: len(new)].long()] & blended & ~new[:, None]).nonzero().T
        return index, view

    def sound(self) -> bool:
        """Whether all stored logits are finite. Waits for the device."""
        return bool(torch.isfinite(self.t[: len(self.pool)]).all())

    def _pixels(self, index: Tensor, view: Tensor) -> Tensor:
        """View `view` [B] of the images in slots `index` [B]: float in [0, 1], [B, C, H, W]."""
        a, shift, mirrored = self.augment, self.shift[index, view].long(), self.mirrored[index, view]
        x = self._shifted(index, shift[:, 0].T, mirrored[:, 0])
        if not a.mixes:
            return x
        other = self._shifted(self.partner[index, view].long(), shift[:, 1].T, mirrored[:, 1])
        h, w = x.shape[2:]
        return torch.lerp(other, x, mix_weights(self.u[index, view].T, h, w, a.mix, a.mix_share))

    def _shifted(self, slots: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
        """The images in `slots` [B], shifted by dy and dx [2, B] pixels, and mirrored where `mirrored` [B]."""
        a = self.augment
        return to_float(shift_flip(self._images(slots), shift[0], shift[1], mirrored, a.padding, a.pad))

    def _images(self, slots: Tensor) -> Tensor:
        """The images in `slots` [B], uint8 on the pool's device."""
        return self.pool.x[slots].to(self.pool.device)

    def __call__(
        self, index: Tensor, generator: torch.Generator, ranks: Ranks | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One view each of the images in slots `index` [B].

        Returns x, float in [0, 1], [B, C, H, W], and its stored teacher logits [B, K], or None if there are none.
        `generator` draws the index of a stored view, or a new view. Of several `ranks`, each gets its
        part of the batch.
        """
        a = self.augment
        ranks, n = ranks or Ranks(), len(index)
        mine = ranks.cut(index, n)
        if self.count:
            view = ranks.cut(torch.randint(self.count, (n,), device=index.device, generator=generator), n)
            return self._pixels(mine, view), self.t[mine, view].float()
        if a.resizes:
            draws: tuple[Tensor, ...] = tuple(torch.rand(5, n, generator=generator, device=generator.device))
        else:
            shifts, mirrored = shift_draws(n, a.pad, generator, a.flip)
            draws = (*shifts, mirrored)

        def seen(order: Tensor | None = None) -> Tensor:
            """This rank's part of the batch in another order."""
            slots, *how = (ranks.cut(v if order is None else v[order], n) for v in (index, *draws))
            if a.resizes:
                return resized_part(to_float(self._images(slots)), torch.stack(how), a.scale, a.flip)
            return self._shifted(slots, torch.stack(how[:2]), how[2])

        x = seen()
        if not a.mixes:
            return x, None if a.moves else self.pool.logits[mine]
        partner = torch.randperm(n, generator=generator, device=generator.device)
        h, w = x.shape[2:]
        u = torch.rand(4, n, generator=generator, device=generator.device)
        weight = ranks.cut(mix_weights(u, h, w, a.mix, a.mix_share), n)
        other = x[partner] if len(x) == n else seen(partner)  # another rank's image is read here, too
        return torch.lerp(other, x, weight), None

    def state_dict(self) -> dict[str, Any]:
        size = len(self.pool) if self.count else 0
        return {
            "count": self.count,
            "reason": self.reason,
            "generator": self.generator.get_state(),
            **{name: getattr(self, name)[:size].clone() for name in ("shift", "mirrored", "t", "partner", "u")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.pool.device
        self.count, self.reason = state["count"], state["reason"]
        restore_stream(self.generator, state["generator"])
        self.t = state["t"].to(device)
        # checkpoints from before blends were stored have one image in a view, and no axis S
        S, views = self.shift.shape[2], self.t.shape[:2]
        self.shift = state["shift"].to(device).reshape(*views, S, 2)
        self.mirrored = state["mirrored"].to(device).reshape(*views, S)
        self.partner, self.u = (state.get(k, getattr(self, k)).to(device) for k in ("partner", "u"))
