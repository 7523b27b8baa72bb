"""What other ways to train one LoRA layer move, counted like :attr:`Traffic.dram`: each operand of each kernel once.

The layer is ``y = x W^T + D(x) A^T B^T s`` with M rows, k inputs, n outputs, rank r, dropout, no bias, everything in a
dtype of ``itemsize`` bytes, and a step is its forward and backward. (Caches smaller than an operand make all of them
read more than that; a GEMM does so in each of the three ways.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One layer, and the bytes of what a step of it touches."""

    m: int
    k: int
    n: int
    r: int
    itemsize: int = 2

    @property
    def x(self) -> int:
        return self.m * self.k * self.itemsize

    @property
    def y(self) -> int:
        return self.m * self.n * self.itemsize

    @property
    def weight(self) -> int:
        return self.n * self.k * self.itemsize

    @property
    def a(self) -> int:
        return self.r * self.k * self.itemsize

    @property
    def b(self) -> int:
        return self.n * self.r * self.itemsize

    @property
    def s(self) -> int:
        return self.m * self.r * self.itemsize

    @property
    def mask(self) -> int:
        """One byte an element, as PyTorch and LoRAFusion keep it."""
        return self.m * self.k

    @property
    def product(self) -> int:
        """One product with the weight: ``x W^T``, or ``dy W``."""
        return self.x + self.weight + self.y

    @property
    def frozen(self) -> int:
        """The layer without an adapter."""
        return 2 * self.product

    @property
    def eager(self) -> int:
        """PyTorch, an operator after the other."""
        base = self.product
        dropout = 2 * self.x + self.mask
        down, up = self.x + self.a + self.s, self.s + self.b + self.y
        scale, add = 2 * self.y, 3 * self.y
        forward = base + dropout + down + up + scale + add
        # scale; dS and dB; dA and the gradient of the dropped x; dropout; dy W; the sum of the two gradients of x
        backward = scale + 2 * up + 2 * down + dropout + base + 3 * self.x
        return forward + backward

    @property
    def lorafusion(self) -> int:
        """The kernels of arXiv 2510.00206: dropout is fused with the product with A, and the dropped x and its mask
        are written for the backward. (Its code at the time of writing takes that product apart; not counted here.)
        """
        forward = (2 * self.x + self.mask + self.a + self.s) + (self.x + self.weight + self.y + self.s + self.b)
        db_and_ds = self.y + 2 * self.s + 2 * self.b
        da = self.x + self.s + self.a
        dx = self.y + self.weight + self.x + self.mask + self.s + self.a
        return forward + db_and_ds + da + dx
