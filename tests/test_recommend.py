"""Recommender against the formula in dense float64; ids, seen items and short lists."""

from __future__ import annotations

import functools

import pytest
import torch
from contract import assert_contract
from torch import Tensor

import byol_fast as bf
from byol_fast import recommend

USERS, ITEMS = 60, 40
adam = functools.partial(torch.optim.Adam, lr=0.02)


@pytest.fixture(scope="module")
def interactions() -> tuple[Tensor, Tensor, Tensor]:
    """Users like the items of one of four groups; ids are neither dense nor sorted."""
    generator = torch.Generator().manual_seed(0)
    likes = (torch.arange(USERS)[:, None] % 4) == (torch.arange(ITEMS) % 4)
    has = torch.rand(USERS, ITEMS, generator=generator) < torch.where(likes, 0.6, 0.05)
    rows, columns = has.nonzero().T
    order = torch.randperm(len(rows), generator=generator)
    rows, columns = rows[order], columns[order]
    values = torch.randint(1, 6, (len(rows),), generator=generator).float()
    return 1000 - 7 * rows, 5 + 3 * columns, values


def dense(interactions: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    matrix = torch.zeros(USERS, ITEMS, dtype=dtype)
    users, items, values = interactions
    # Ids ascend in the matrix.
    matrix[users.unique(return_inverse=True)[1], items.unique(return_inverse=True)[1]] = values.to(dtype)
    return matrix


def scores_by_formula(matrix: Tensor, rank: int, a: float, b: float, shrinkage: float) -> Tensor:
    """X diag(n_i)^-b V S Vᵀ diag(n_i)^b, with V and S of the scaled matrix."""
    per_user, per_item = (matrix != 0).sum(1).to(matrix.dtype), (matrix != 0).sum(0).to(matrix.dtype)
    _, values, axes = torch.linalg.svd(per_user[:, None] ** -a * matrix * per_item**-b, full_matrices=False)
    energy, axes = values[:rank].square(), axes[:rank]
    kept = energy / (energy + shrinkage * energy[-1])
    return (matrix * per_item**-b) @ axes.T * kept @ axes * per_item**b


@pytest.mark.parametrize(("a", "b", "shrinkage"), [(0.0, 0.0, 0.0), (0.25, 0.25, 1.0), (0.5, 0.5, 0.3)])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_those_of_the_formula(interactions, a, b, shrinkage, tied):
    model = bf.Recommender(4, tied=tied, user_power=a, item_power=b, shrinkage=shrinkage)
    model.fit(*interactions)
    users, items = model.user_ids.repeat_interleave(ITEMS), model.item_ids.repeat(USERS)
    eager, truth = (
        scores_by_formula(dense(interactions, dtype), 4, a, b, shrinkage).reshape(-1)
        for dtype in (torch.float32, torch.float64)
    )
    assert_contract(model.predict(users, items), eager, truth, "scores")


@pytest.mark.parametrize("tied", [False, True])
def test_joint_training_comes_to_the_same_scores(interactions, tied):
    exact, joint = (bf.Recommender(4, tied=tied) for _ in range(2))
    exact.fit(*interactions, method="exact")
    torch.manual_seed(1)
    result = joint.fit(*interactions, method="joint", epochs=300, batch_size=None, optimizer=adam, stop_at=1 + 1e-5)
    assert result.certificate <= 1 + 1e-5
    users, items = exact.user_ids.repeat_interleave(ITEMS), exact.item_ids.repeat(USERS)
    truth = exact.predict(users, items)
    # A loss within 1e-5 of the best is reached by weights, hence scores, within about its square root.
    assert float((joint.predict(users, items) - truth).norm() / truth.norm()) < 3e-2


def test_the_best_items_come_first_and_seen_ones_not_at_all(interactions, monkeypatch):
    users, items, _ = interactions
    model = bf.Recommender(4)
    model.fit(users, items)
    asked = model.user_ids[[3, 0, 3, 59]]
    whole = model.predict(asked.repeat_interleave(ITEMS), model.item_ids.repeat(len(asked))).reshape(len(asked), -1)
    for block in (recommend._BLOCK_BYTES, 4 * ITEMS):
        monkeypatch.setattr(recommend, "_BLOCK_BYTES", block)
        for exclude in (True, False):
            allowed = whole.clone()
            if exclude:
                for row, user in enumerate(asked):
                    allowed[row, torch.isin(model.item_ids, items[users == user])] = -torch.inf
            found = model.recommend(asked, 5, exclude_seen=exclude)
            assert torch.equal(found.items, model.item_ids[allowed.topk(5, dim=1).indices])
            assert_contract(found.scores, found.scores, allowed.topk(5, dim=1).values.double(), "scores")


def test_no_more_than_a_block_of_scores_exists(interactions, monkeypatch):
    users, items, _ = interactions
    model = bf.Recommender(4)
    model.fit(users, items)
    monkeypatch.setattr(recommend, "_BLOCK_BYTES", 4 * ITEMS * 7)
    sizes = []
    decode = model.layer.decode
    monkeypatch.setattr(model.layer, "decode", lambda code: sizes.append(len(code)) or decode(code))
    assert model.recommend(model.user_ids, 3).items.shape == (USERS, 3)
    assert max(sizes) == 7


def test_a_user_with_few_items_left_gets_a_short_list():
    model = bf.Recommender(1)
    model.fit([1, 1, 2], [7, 8, 9])
    found = model.recommend([1], 3)
    assert found.items.tolist() == [[9, -1, -1]]
    assert found.scores[0, 1:].tolist() == [-torch.inf, -torch.inf]
    assert model.recommend([], 2).items.shape == (0, 2)


def test_the_loss_of_exact_training_is_that_of_the_layer(interactions):
    model = bf.Recommender(4, user_power=0, item_power=0, shrinkage=0)
    result = model.fit(*interactions)
    eager, truth = (
        torch.nn.functional.mse_loss(model.layer.to(dtype)(dense(interactions, dtype)), dense(interactions, dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert_contract(torch.tensor(result.loss), eager.detach(), truth.detach(), "loss")


def test_repeated_interactions_add_up():
    model = bf.Recommender(1)
    model.fit([5, 5, 4], [3, 3, 2], torch.tensor([1.0, 2.0, 4.0]))
    assert model.interactions.to_dense().tolist() == [[4.0, 0.0], [0.0, 3.0]]


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="item_power: expected a number ≥ 0, got -1"):
        bf.Recommender(2, item_power=-1)
    model = bf.Recommender(2)
    with pytest.raises(TypeError, match=r"users: expected integer ids of shape \[n\], got torch.float32"):
        model.fit(torch.rand(3), torch.arange(3))
    with pytest.raises(ValueError, match="expected the same number n ≥ 1 of each, got 2, 3 and 2"):
        model.fit([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"rank: expected 1 ≤ rank ≤ min\(users, items\) = 1, got 2"):
        model.fit([1], [1])
    with pytest.raises(TypeError, match='options: expected none with method "exact", got epochs'):
        model.fit([1, 2, 3], [1, 2, 3], epochs=3)
    model.fit([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="users: expected ids that were trained on, got 9"):
        model.recommend([1, 9], 1)
    with pytest.raises(ValueError, match="k: expected an integer, 1 ≤ k ≤ items = 3, got 4"):
        model.recommend([1], 4)
    with pytest.raises(ValueError, match="items: expected as many as users, 2, got 1"):
        model.predict([1, 2], [1])
