"""match_places in both its forms against plain loops over Python floats: the last bit of every distance, every tie, wrong arguments."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personmae_kernels import compiled, launching
from personmae_kernels.match_places import (
    Bounds,
    Matches,
    Vectors,
    counts_of_steps,
    new_steps,
    pair_distances,
    place_distances_,
    place_products_,
)

needs_compiled = pytest.mark.skipif(not compiled.available(), reason=compiled.why_missing())
FORMS = ["reference", pytest.param("compiled", marks=needs_compiled)]


@pytest.fixture(params=FORMS)
def form(request):
    launching.use_operators(request.param)
    yield request.param
    launching.use_operators(None)


def plain_distance(a: list[float], a_scale: float, b: list[float], b_scale: float, cosine: bool) -> float:
    """From the head of match_places.py, one number at a time."""
    if cosine and 0 in (a_scale, b_scale):
        return 1.0
    lanes = [0.0] * 32
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        difference = x * a_scale - y * b_scale
        lanes[i % 32] += difference * difference
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
    return 0.5 * lanes[0] if cosine else math.sqrt(lanes[0])


def vectors(generator, num, width, dtype=torch.float32, scale="norm"):
    features = torch.from_numpy(generator.normal(size=(num, width))).to(dtype)
    factors = 1 / features.double().norm(dim=1) if scale == "norm" else torch.ones(num, dtype=torch.float64)
    return Vectors(features, factors)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 63, 64, 100, 768])
def test_distances_are_the_definition_to_the_bit(form, width, dtype, cosine):
    generator = np.random.default_rng(width)
    query, gallery = (vectors(generator, num, width, dtype, "norm" if cosine else "one") for num in (5, 7))
    query.scale[2] = gallery.scale[3] = 0 if cosine else 1
    rows, columns = (torch.from_numpy(numbers.ravel()) for numbers in np.indices((5, 7)))
    found = pair_distances(query, gallery, rows, columns, cosine=cosine)
    wanted = [
        plain_distance(query.features[q].tolist(), query.scale[q].item(), gallery.features[g].tolist(), gallery.scale[g].item(), cosine)
        for q in range(5)
        for g in range(7)
    ]
    assert found.dtype == torch.float64
    assert found.tolist() == wanted


@needs_compiled
def test_forms_agree_to_the_bit_on_many_pairs():
    generator = np.random.default_rng(0)
    query, gallery = vectors(generator, 50, 771), vectors(generator, 500, 771)
    rows, columns = torch.from_numpy(generator.integers(0, 50, 20_000)), torch.from_numpy(generator.integers(0, 500, 20_000))
    for cosine in (True, False):
        found = {}
        for name in ("reference", "compiled"):
            launching.use_operators(name)
            found[name] = pair_distances(query, gallery, rows, columns, cosine=cosine)
        launching.use_operators(None)
        assert torch.equal(found["reference"], found["compiled"])


def matches_of(distances: np.ndarray, own: list[list[int]]) -> Matches:
    """Those gallery images `own` of each query, by (distance, index)."""
    index = [[g for _, g in sorted((distances[q, g], g) for g in images)] for q, images in enumerate(own)]
    offsets = np.cumsum([0, *map(len, index)])
    values = [float(distances[q, g]) for q, images in enumerate(index) for g in images]
    flat = [g for images in index for g in images]
    return Matches(torch.from_numpy(offsets), torch.tensor(flat, dtype=torch.int64), torch.tensor(values, dtype=torch.float64))


def plain_counts(distances: np.ndarray, matches: Matches) -> list[list[int]]:
    rows = []
    for q, (start, end) in enumerate(zip(matches.offsets.tolist(), matches.offsets.tolist()[1:], strict=False)):
        for match, own in zip(matches.match[start:end].tolist(), matches.distance[start:end].tolist(), strict=True):
            row = distances[q].tolist()
            tied = [g for g, value in enumerate(row) if value == own]
            rows.append([sum(value < own for value in row), sum(g < match for g in tied), sum(g > match for g in tied)])
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], []]


@st.composite
def matrices(draw):
    num_queries, num_gallery = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    values = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, math.inf])
    distances = np.array(draw(st.lists(values, min_size=num_queries * num_gallery, max_size=num_queries * num_gallery)))
    own = draw(st.lists(st.sets(st.integers(0, num_gallery - 1)), min_size=num_queries, max_size=num_queries))
    return distances.reshape(num_queries, num_gallery), [sorted(images) for images in own]


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=150, deadline=None)
@given(case=matrices(), step=st.integers(1, 12), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_counts_of_a_matrix_with_many_ties(name, case, step, dtype):
    distances, own = case
    matches = matches_of(distances, own)
    steps = new_steps(matches)
    launching.use_operators(name)
    for first in range(0, distances.shape[1], step):
        place_distances_(steps, matches, torch.from_numpy(distances[:, first : first + step]).to(dtype), first)
    launching.use_operators(None)
    assert [count.tolist() for count in counts_of_steps(steps, matches.offsets)] == plain_counts(distances, matches)


def example(cosine=False, dtype=torch.float32, num_queries=4, num_gallery=300, width=5):
    """Features of few values, so with many ties, and bounds that leave some pairs open."""
    generator = np.random.default_rng(0)
    features = [torch.from_numpy(generator.integers(-1, 2, (num, width))).to(dtype) for num in (num_queries, num_gallery)]
    norms = [part.double().norm(dim=1) for part in features]
    scales = [torch.where(norm == 0, 0.0, 1 / norm) if cosine else torch.ones_like(norm) for norm in norms]
    query, gallery = (Vectors(*pair) for pair in zip(features, scales, strict=True))
    rows, columns = (torch.from_numpy(numbers.ravel()) for numbers in np.indices((num_queries, num_gallery)))
    exact = pair_distances(query, gallery, rows, columns, cosine=cosine).view(num_queries, num_gallery)
    matches = matches_of(exact.numpy(), [generator.choice(num_gallery, size, replace=False).tolist() for size in (9, 0, 1, 40)])
    products = (query.features.double() * query.scale[:, None]) @ (gallery.features.double() * gallery.scale[:, None]).T
    squares = [(part.features.double() * part.scale[:, None]).square().sum(1) for part in (query, gallery)]
    doubt = 1e-3
    target = 2 * matches.distance if cosine else matches.distance.square()
    target = target - torch.repeat_interleave(squares[0], matches.offsets.diff())
    slack, norm = (torch.where(scale == 0, math.inf, value).double() for scale, value in zip(scales, (doubt, 1.0), strict=True))
    bounds = Bounds(
        torch.stack([target - doubt, target + doubt]),
        slack,
        torch.stack([squares[1] - doubt, squares[1] + doubt, norm]),
    )
    return {"matches": matches, "products": products.float(), "bounds": bounds, "query": query, "gallery": gallery}, exact.numpy()


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [1, 7, 300])
def test_counts_of_products_are_those_of_the_distances(form, step, dtype, cosine):
    case, exact = example(cosine, dtype)
    steps = new_steps(case["matches"])
    for first in range(0, 300, step):
        part = slice(first, first + step)
        bounds = case["bounds"]._replace(gallery=case["bounds"].gallery[:, part])
        gallery = case["gallery"].rows(part)
        place_products_(steps, case["matches"], case["products"][:, part], bounds, case["query"], gallery, cosine=cosine, first=first)
    assert [count.tolist() for count in counts_of_steps(steps, case["matches"].offsets)] == plain_counts(exact, case["matches"])


@pytest.mark.parametrize("spoilt", ["products", "norm", "slack"])
def test_where_nothing_is_known_the_distance_decides(form, spoilt):
    case, exact = example()
    if spoilt == "products":
        case["products"][:, ::3], case["products"][:, 1::3] = math.nan, math.inf
        case["bounds"].gallery[2, 1::3] = math.inf
    elif spoilt == "norm":
        case["bounds"].gallery[2, ::2] = math.inf
    else:
        case["bounds"].slack[0], case["bounds"].slack[3] = math.inf, math.nan
    steps = new_steps(case["matches"])
    place_products_(steps, **case, cosine=False)
    assert [count.tolist() for count in counts_of_steps(steps, case["matches"].offsets)] == plain_counts(exact, case["matches"])


@needs_compiled
def test_forms_agree_on_every_step():
    case, exact = example()
    found = {}
    for name in ("reference", "compiled"):
        launching.use_operators(name)
        steps = [new_steps(case["matches"]), new_steps(case["matches"])]
        place_products_(steps[0], **case, cosine=False)
        place_distances_(steps[1], case["matches"], torch.from_numpy(exact))
        found[name] = torch.stack(steps)
    launching.use_operators(None)
    assert torch.equal(found["reference"], found["compiled"])
    assert torch.equal(found["compiled"][0], found["compiled"][1])


@needs_compiled
def test_compiled_does_not_depend_on_the_number_of_threads():
    case, _ = example(num_gallery=20_000)
    threads = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(new_steps(case["matches"]))
            place_products_(found[-1], **case, cosine=False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nothing_to_place(form):
    case, _ = example()
    steps = new_steps(case["matches"])
    place_distances_(steps, case["matches"], torch.zeros(4, 0))
    assert not steps.any()
    none = Matches(torch.zeros(5, dtype=torch.int64), *(torch.zeros(0, dtype=dtype) for dtype in (torch.int64, torch.float64)))
    steps = new_steps(none)
    place_distances_(steps, none, torch.zeros(4, 9))
    assert counts_of_steps(steps, none.offsets).closer.shape == (0,)
    empty = torch.zeros(0, dtype=torch.int64)
    assert pair_distances(case["query"], case["gallery"], empty, empty, cosine=True).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"products": lambda t: t.double().half()}, TypeError, "products: float32"),
        ({"products": lambda t: t[:3]}, ValueError, "is needed, got shape"),
        ({"matches": lambda m: m._replace(match=m.match[:-1])}, ValueError, "distance: axis M"),
        ({"matches": lambda m: m._replace(offsets=m.offsets[:-1])}, ValueError, "offsets"),
        ({"matches": lambda m: m._replace(match=m.match.int())}, TypeError, "match: int64"),
        ({"bounds": lambda b: b._replace(slack=b.slack[:2])}, ValueError, "slack: axis Q"),
        ({"bounds": lambda b: b._replace(gallery=b.gallery[:2])}, ValueError, "gallery_bounds"),
        ({"bounds": lambda b: b._replace(matches=b.matches.float())}, TypeError, "match_bounds: float64"),
        ({"query": lambda v: v._replace(scale=v.scale.float())}, TypeError, "query_scale: float64"),
        ({"gallery": lambda v: v._replace(features=v.features.double())}, TypeError, "gallery: float32, as in query"),
        ({"gallery": lambda v: v._replace(features=v.features[:, :4])}, ValueError, "gallery: axis D"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    case, _ = example()
    ((name, spoil),) = change.items()
    with pytest.raises(error, match=words):
        place_products_(new_steps(case["matches"]), **{**case, name: spoil(case[name])}, cosine=False)


@pytest.mark.parametrize("number", [-1, 300])
def test_a_pair_that_is_not_there_is_refused(form, number):
    case, _ = example()
    if form == "reference" and number < 0:
        pytest.skip("negative numbers count from the end in PyTorch")
    with pytest.raises((IndexError, RuntimeError)):
        pair_distances(case["query"], case["gallery"], torch.tensor([0]), torch.tensor([number]), cosine=False)


@needs_compiled
def test_the_compiled_operators_refuse_offsets_that_lead_astray():
    case, exact = example()
    for offsets in ([0, 9, 8, 10, 50], [1, 9, 9, 10, 50], [0, 9, 9, 10, 49]):
        wrong = case["matches"]._replace(offsets=torch.tensor(offsets))
        with pytest.raises(RuntimeError, match="offsets"):
            torch.ops.personmae.place_distances_(new_steps(wrong), *wrong, torch.from_numpy(exact), 0)


@needs_compiled
def test_opcheck():
    case, exact = example()
    matches, bounds = case["matches"], case["bounds"]
    rows = torch.tensor([0, 3, 1])
    torch.library.opcheck(torch.ops.personmae.pair_distances, (*case["query"], *case["gallery"], rows, rows, True))
    torch.library.opcheck(torch.ops.personmae.place_distances_, (new_steps(matches), *matches, torch.from_numpy(exact), 0))
    arguments = (bounds.matches, case["products"], bounds.slack, bounds.gallery, *case["query"], *case["gallery"], False, 0)
    torch.library.opcheck(torch.ops.personmae.place_products_, (new_steps(matches), *matches, *arguments))


@pytest.mark.gpu
def test_the_same_on_cuda():
    case, exact = example()
    on_cuda = {
        name: type(value)(*(tensor.cuda() for tensor in value)) if isinstance(value, tuple) else value.cuda() for name, value in case.items()
    }
    steps = [new_steps(on_cuda["matches"]), new_steps(on_cuda["matches"])]
    place_products_(steps[0], **on_cuda, cosine=False)
    place_distances_(steps[1], on_cuda["matches"], torch.from_numpy(exact).cuda())
    for own in steps:
        counts = counts_of_steps(own, on_cuda["matches"].offsets)
        assert [count.tolist() for count in counts] == plain_counts(exact, case["matches"])
    generator = np.random.default_rng(0)
    query, gallery = vectors(generator, 50, 771), vectors(generator, 500, 771)
    rows, columns = torch.from_numpy(generator.integers(0, 50, 20_000)), torch.from_numpy(generator.integers(0, 500, 20_000))
    there_too = [Vectors(part.features.cuda(), part.scale.cuda()) for part in (query, gallery)]
    for cosine in (True, False):
        there = pair_distances(*there_too, rows.cuda(), columns.cuda(), cosine=cosine)
        assert torch.equal(there.cpu(), pair_distances(query, gallery, rows, columns, cosine=cosine))
