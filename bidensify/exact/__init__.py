"""The one definition of the deployed arithmetic: thresholds, bits, integer sums, then scale, shift, bypass and activation.

A sign flips where an activation crosses its threshold, and one flipped sign moves many others behind it: a network of
binary layers gives the same answer twice only if every rounding is the same. So this is a definition, for any memory
format, number of threads and instruction set. Latent layers without gradients (``latent``) and the packed reference
(``bidensify.deploy.reference``) are ``forward`` with two ways to compute the integer sums; kernels are tested against it.
Numbers are float32 where nothing else is said, and each operation rounds:

1. sums over space: blocks of 64 consecutive positions, in a block quads (x0 + x1) + (x2 + x3) of consecutive positions
   added one after the other, a missing position counting as 0; block sums are added in float64, where their order does
   not show (on a GPU, which has no kernels of its own here, float64 is taken throughout: equal to rounding);
2. beta = k * mean + b, rounded to the input's dtype; distance: the same blocks of |x - beta|, added over channels too;
   alpha = exp(a * (mean distance - 1)) in float64, rounded once. The binarized input is middle + half * s, s = +1 where
   x >= beta and -1 elsewhere (alpha is half, and middle is 0); where a part turns channels round (``flips``) the weights'
   signs of that input channel are turned instead, which needs middle = 0 and weights without an offset. With two bit planes
   half is the step too, from the sample 1.248 * exp(a) * mean distance in float64, rounded once: s1 = s; s2 = +1 where
   x >= beta + half (s1 = +1) or x >= beta - half (s1 = -1) and -1 elsewhere, the sum or difference rounded to float32; the
   binarized input is middle + half * (s1 + s2 / 2), and from here on s stands for 2 * s1 + s2 and half for half of itself;
3. dot = the integer sum of s times the weights' signs, padded positions contributing 0; where weights have an offset,
   window = the integer sum of s over the window and the group, taps = how many positions it has;
4. BatchNorm, the weights' scale and offset and what else is constant per output channel: ``fold``, in float64, rounded once;
5. y = dot * (scale * half) + bias;
6. the other signals, summed first: ((bypass + residual) + (sum of signs * middle) * scale)
   + (window * half + taps * middle) * offset, then y + that sum. A bypass that joins behind the activation is left out here;
7. y > 0 ? y * rise : y * slope; the smaller of that and the upper bound, the larger of that and the lower bound; + post;
   then + (bypass + residual) where it joins behind the activation; then rounded to the input's dtype.

A part's own ``codes``, ``folded`` and ``exact`` say what it is; nothing here asks for an exact class.
Source of the layer itself: BiDense (arXiv 2411.10346), eq. 1-6.
"""

from __future__ import annotations

from bidensify.exact.definition import activation_scale, check_flips, own_codes, plus_minus, thresholds
from bidensify.exact.fold import Affine, Folded, Pointwise, fold, folded
from bidensify.exact.forward import Bits, Sums, binarize, forward
from bidensify.exact.latent import evaluate, signs_in_use
from bidensify.exact.sums import BLOCK, any_order, block_sums, wide

__all__ = [
    "BLOCK",
    "Affine",
    "Bits",
    "Folded",
    "Pointwise",
    "Sums",
    "activation_scale",
    "any_order",
    "binarize",
    "block_sums",
    "check_flips",
    "evaluate",
    "fold",
    "folded",
    "forward",
    "own_codes",
    "plus_minus",
    "signs_in_use",
    "thresholds",
    "wide",
]
