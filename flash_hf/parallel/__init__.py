# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: each process holds one piece of every row, and the results are those of whole rows.

All that precedes a chunk is summed in S x E numbers, so a piece needs little of the others (LASP-2, arXiv 2502.07563):

- the sum of `lin_k v^T` over its first document's earlier pieces (bidirectional: also over its last document's later
  ones): one all-gather per layer, and one reduce-scatter of the gradients in the backward;
- the tokens beyond the cut that share a chunk with its own, and with shifted keys the token before: a second
  all-gather of at most a chunk of hidden states, or with kernels of the projections' outputs, in layers where chunks
  cross a cut or keys are shifted.

```python
>>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "cp"))  # doctest: +SKIP
>>> context_parallel(model, mesh["cp"])  # doctest: +SKIP
>>> loss = model(**shard_sequence(batch, mesh["cp"])).loss  # doctest: +SKIP

```
"""

from .context import context_parallel, shard_sequence


__all__ = ["context_parallel", "shard_sequence"]
