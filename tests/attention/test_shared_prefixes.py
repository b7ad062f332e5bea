"""Joint attention to shared prefixes and own tokens is plain attention to both."""

from __future__ import annotations

import pytest
import torch

from cai.attention.shared_prefixes import OwnKeyValues, PrefixGroups, PrefixKeyValues, joint_attention


@pytest.mark.usefixtures("pads_sizes")
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(
    ("prefix_of_row", "max_size"), [([0, 0, 1, 1], 9), ([1, 0, 0, 2, 0, 0, 0], 9), ([2, 2, 2, 0], 1)]
)
def test_joint_attention_is_attention_to_the_prefix_and_the_own_tokens_together(
    prefix_of_row: list[int], max_size: int, heads: int
) -> None:
    torch.manual_seed(0)
    n_rows, kv_heads, width, length, own_length = len(prefix_of_row), 2, 8, 5, 3
    keys, values = torch.randn(3, kv_heads, length, width), torch.randn(3, kv_heads, length, width + 3)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 3:] = False
    query, own_keys = torch.randn(n_rows, heads, own_length, width), torch.randn(n_rows, kv_heads, own_length, width)
    own_values = torch.randn(n_rows, kv_heads, own_length, width + 3)
    causal = torch.ones(own_length, own_length, dtype=torch.bool).tril()
    prefix_mask = mask[prefix_of_row][:, None].expand(-1, own_length, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([keys[prefix_of_row], own_keys], dim=2),
        torch.cat([values[prefix_of_row], own_values], dim=2),
        attn_mask=torch.cat([prefix_mask, causal.expand(n_rows, -1, -1)], dim=-1)[:, None],
        enable_gqa=True,
    )
    device = torch.device("cpu")
    own_bias = torch.zeros(own_length, own_length).masked_fill(~causal, -1e30).repeat(heads // kv_heads, 1)
    rows_of = {prefix: [n for n in range(n_rows) if prefix_of_row[n] == prefix] for prefix in set(prefix_of_row)}
    by_prefix = [
        PrefixGroups([prefix], len(rows), [(0, slot) for slot in range(len(rows))], device, rows)
        for prefix, rows in sorted(rows_of.items())
    ]
    for parts in ([PrefixGroups.build(prefix_of_row, max_size, device)], by_prefix):
        out = joint_attention(
            (query * width**-0.5).reshape(n_rows, kv_heads, -1, width),
            [
                PrefixKeyValues(
                    keys.transpose(-1, -2)[groups.prefixes],
                    values[groups.prefixes],
                    torch.zeros(mask.shape).masked_fill(~mask, -1e30)[groups.prefixes][:, None, None],
                    groups,
                )
                for groups in parts
            ],
            OwnKeyValues(own_keys.transpose(-1, -2), own_values, own_bias),
        )
        torch.testing.assert_close(out.reshape(expected.shape), expected, atol=1e-6, rtol=1e-5)
