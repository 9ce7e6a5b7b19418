"Statistics of a world of feature trees, of our generator and of SAELens' alike."

from collections.abc import Iterable

import torch
from torch import Tensor


def tree_levels(n_roots: int, n_branches: int, depth: int, n_features: int) -> list[slice]:
    "Features of each level of the trees, and last those outside; in breadth-first order."
    edges = [0]
    for level in range(depth + 1):
        edges.append(edges[-1] + n_roots * n_branches**level)
    return [slice(a, b) for a, b in zip(edges, [*edges[1:], n_features], strict=True)]


def statistics(
    batches: Iterable[tuple[Tensor, Tensor]],  # of x (n, d_in) and a (n, n_features)
    levels: list[slice],
    n_branches: int,
) -> dict:
    "What the samples have in common, whatever their seed."
    counts, norms, roots, values, families = [], [], [], [[] for _ in levels], []
    for x, a in batches:
        on = a > 0
        counts.append(torch.stack([on[:, level].sum(1) for level in levels], 1).float())
        norms.append(x.norm(dim=1))
        roots.append(on[:, levels[0]].float())
        for found, level in zip(values, levels, strict=True):
            found.append(a[:, level][on[:, level]])
        families.append(_families(on, levels, n_branches))
    count, norm, root = torch.cat(counts), torch.cat(norms), torch.cat(roots)
    has_child, orphans, most = zip(*families, strict=True)
    phi = torch.corrcoef(root.T)[*torch.triu_indices(root.shape[1], root.shape[1], 1)]
    return dict(
        n=len(norm),
        l0=float(count.sum(1).mean()),
        l0_std=float(count.sum(1).std()),
        l0_of_levels=count.mean(0).tolist(),
        value_of_levels=[float(torch.cat(v).mean()) for v in values],
        value_std_of_levels=[float(torch.cat(v).std()) for v in values],
        child_share_of_levels=torch.stack(has_child).mean(0).tolist(),
        children_without_parent=sum(orphans),
        most_siblings=max(most),
        norm=float(norm.mean()),
        norm_std=float(norm.std()),
        root_correlation=float((phi.square().mean() - 1 / len(norm)).clamp(min=0).sqrt()),
    )


def _families(on: Tensor, levels: list[slice], n_branches: int) -> tuple[Tensor, int, int]:
    "Share of active parents with a child, by level; children without parent; most siblings."
    shares, orphans, most = [], 0, 0
    for above, below in zip(levels[:-2], levels[1:-1], strict=True):
        parent, child = on[:, above], on[:, below].unflatten(1, (-1, n_branches))
        shares.append((parent & child.any(2)).sum() / parent.sum().clamp(min=1))
        orphans += int((child & ~parent[..., None]).sum())
        most = max(most, int(child.sum(2).max()))
    return torch.stack(shares), orphans, most
