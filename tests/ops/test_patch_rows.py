"""patch_rows in both forms against float64 loops over patches: odd sizes, all patches and chosen ones, output formats, numbers off the grid."""

import pytest
import torch
from closeness import DEVICE, assert_close

from personmae_kernels import launching
from personmae_kernels.patch_rows import _patch_rows, patch_rows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def exact_rows(images, visible, patch_px):
    """From the definition, patch by patch, in float64."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    values = (images.double().cpu() / 255 - mean) / std
    num_columns = images.shape[2] // patch_px
    numbers = range(num_columns * (images.shape[1] // patch_px))
    rows = []
    for b, image in enumerate(values):
        for number in numbers if visible is None else visible[b].tolist():
            top, left = number // num_columns * patch_px, number % num_columns * patch_px
            rows.append(image[top : top + patch_px, left : left + patch_px].permute(2, 0, 1).flatten())  # (c, y, x)
    width = 3 * patch_px**2
    return torch.stack(rows).reshape(len(images), -1, width) if rows else torch.empty(len(images), 0, width, dtype=torch.float64)


def example(B=3, grid=(2, 3), patch_px=4, V=4, index_dtype=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, grid[0] * patch_px, grid[1] * patch_px, 3), generator=generator, dtype=torch.uint8)
    numbers = torch.rand(B, grid[0] * grid[1], generator=generator).argsort(1)[:, :V]
    return images.to(DEVICE), numbers.to(DEVICE, index_dtype)


def check(images, visible, patch_px, dtype=torch.float32):
    rows = patch_rows(images, visible, patch_px, MEAN, STD, dtype)
    assert rows.dtype == dtype
    exact = exact_rows(images, visible, patch_px)
    assert_close({"rows": rows}, {"rows": exact}, {"rows": exact.to(dtype)}, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("B", "grid", "patch_px", "V"),
    [(1, (1, 1), 16, 1), (3, (2, 3), 4, 5), (2, (5, 3), 14, 7), (5, (4, 2), 8, 3), (2, (16, 8), 16, 63), (3, (7, 5), 1, 31)],
)
def test_it_is_the_definition(form, B, grid, patch_px, V, dtype):
    images, visible = example(B, grid, patch_px, V)
    check(images, visible, patch_px, dtype)
    check(images, None, patch_px, dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_patch_numbers_of_both_formats_in_any_order(form, index_dtype):
    images, visible = example(V=6, index_dtype=index_dtype)
    visible[:, 0] = visible[:, 1]  # a patch may even stand twice
    check(images, visible, 4)


def test_other_numbers_of_channels(form):
    images, visible = example()
    grey = patch_rows(images[..., 1:2], visible, 4, MEAN[1:2], STD[1:2])
    assert torch.equal(grey, patch_rows(images, visible, 4, MEAN, STD)[..., 16:32])


def test_it_is_the_convolution_of_the_patch_embedding(form):
    images, _ = example(B=2, grid=(4, 2), patch_px=8)
    weight = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pixels = (images.cpu().permute(0, 3, 1, 2).double() / 255 - torch.tensor(MEAN).view(3, 1, 1).double()) / torch.tensor(STD).view(3, 1, 1).double()
    tokens = torch.nn.functional.conv2d(pixels, weight, stride=8).flatten(2).transpose(1, 2)
    rows = patch_rows(images, None, 8, MEAN, STD).double().cpu()
    assert_close({"tokens": rows @ weight.flatten(1).T}, {"tokens": tokens}, floor=1e-6)


def test_non_contiguous_inputs(form):
    images, visible = example()
    images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    visible = visible.t().contiguous().t()
    assert not images.is_contiguous()
    assert not visible.is_contiguous()
    check(images, visible, 4)


@pytest.mark.parametrize(("B", "V"), [(0, 4), (3, 0)])
def test_nothing_to_do(form, B, V):
    images, visible = example(B=B, V=V)
    assert patch_rows(images, visible, 4, MEAN, STD).shape == (B, V, 48)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_number_off_the_grid_shows_and_reads_nothing(triton_form, index_dtype):
    images, visible = example(index_dtype=index_dtype)
    wrong = visible.clone()
    wrong[0, 0], wrong[1, 2], wrong[2, 3] = -1, 6, torch.iinfo(index_dtype).max
    rows, expected = patch_rows(images, wrong, 4, MEAN, STD), patch_rows(images, visible, 4, MEAN, STD)
    for b, v in ((0, 0), (1, 2), (2, 3)):
        assert rows[b, v].isnan().all()
        rows[b, v] = expected[b, v]
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": lambda t: t.float()}, TypeError, "images: uint8"),
        ({"images": lambda t: t[0]}, ValueError, r"images: \[B, H, W, C\] is needed"),
        ({"images": lambda t: t[:, :7]}, ValueError, "patch_px: images of 7x12"),
        ({"images": lambda t: t[..., :2]}, ValueError, "mean: one value for each of 2 channels"),
        ({"visible": lambda t: t.float()}, TypeError, "visible: int32 or int64"),
        ({"visible": lambda t: t[0]}, ValueError, r"visible: \[B, V\] is needed"),
        ({"visible": lambda t: t[:2]}, ValueError, r"visible: axis B of \[B, V\] is 2, but 3 in images"),
        ({"visible": lambda t: t.to("meta")}, ValueError, "visible: is on meta"),
        ({"visible": lambda t: t.tolist()}, TypeError, "visible: a tensor"),
        ({"patch_px": lambda _: 0}, ValueError, "patch_px"),
        ({"std": lambda _: (0.2, 0.0, 0.2)}, ValueError, "std: positive"),
        ({"dtype": lambda _: torch.float64}, TypeError, "dtype: float32, bfloat16 or float16 is needed, got float64"),
    ],
)
def test_wrong_arguments_are_named(form, change, error, words):
    images, visible = example()
    arguments = {"images": images, "visible": visible, "patch_px": 4, "mean": MEAN, "std": STD, "dtype": torch.float32}
    ((name, spoil),) = change.items()
    with pytest.raises(error, match=words):
        patch_rows(**{**arguments, name: spoil(arguments[name])})


@pytest.mark.parametrize("chosen", [True, False])
def test_opcheck(triton_form, chosen):
    images, visible = example()
    torch.library.opcheck(_patch_rows.registered, (images, visible if chosen else None, 4, MEAN, STD, torch.bfloat16))


@pytest.mark.parametrize("chosen", [True, False])
def test_it_compiles_into_one_graph(triton_form, chosen):
    images, visible = example()
    visible = visible if chosen else None
    compiled = torch.compile(patch_rows, backend="aot_eager", fullgraph=True)(images, visible, 4, MEAN, STD)
    assert torch.equal(compiled, patch_rows(images, visible, 4, MEAN, STD))


def test_the_kernel_is_launched(triton_form):
    with launching.recorded() as launches:
        patch_rows(*example(), 4, MEAN, STD)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["patch_rows_kernel"]
