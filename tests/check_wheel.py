"""Whether an installed wheel has its CPU kernels, and these PyTorch's numbers: what a build of wheels is tested by."""

import torch
from torch.nn import functional as F

import unigen_fast as uf

kernels = {backend.name: backend.loaded for backend in uf.info().backends}
assert kernels["cpu"], uf.info()
torch.manual_seed(0)
logits, mean, logvar = (torch.randn(64, size, requires_grad=True) for size in (784, 16, 16))
x = torch.rand(64, 784).round()
fused = uf.elbo_loss(logits, x, mean, logvar).loss
kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / 64
plain = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / 64 + kl
torch.testing.assert_close(fused, plain)
torch.testing.assert_close(*(torch.autograd.grad(loss, (logits, mean, logvar)) for loss in (fused, plain)))
