"""Small copies of each labelled set's layout: empty files for what reads names alone, and tiny images for what decodes."""

from pathlib import Path

from bad_images import encoded, picture


def touch(root: Path, *names: str) -> Path:
    """Empty files with these paths below a root, which is returned."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def draw(root: Path, *names: str, first_seed: int = 0) -> Path:
    """Different tiny JPEGs with these paths below a root, which is returned."""
    for seed, name in enumerate(names, first_seed):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed, 32, 16), "JPEG", quality=90))
    return root


def market(root: Path, suffix: str = ".jpg", with_train: bool = True) -> Path:
    """Two people to train on, two to find, one distractor, one junk image."""
    train = [f"bounding_box_train/{person:04d}_c{camera}s1_000001_00{suffix}" for person in (2, 7) for camera in (1, 2)]
    query = [f"query/{person:04d}_c1s1_000001_00{suffix}" for person in (1, 3)]
    gallery = [f"bounding_box_test/{name}_c2s1_000001_00{suffix}" for name in ("0001", "0003", "0000", "-1")]
    return draw(root, *(train if with_train else []), *query, *gallery)


MSMT17_LINES = {
    "list_train.txt": ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_000_14_0303noon_0015_0.jpg 1"],
    "list_val.txt": ["0001/0001_001_15_0303noon_0016_0.jpg 1"],
    "list_query.txt": ["0000/0000_000_02_0303morning_0001_0.jpg 0"],
    "list_gallery.txt": ["0001/0001_000_04_0303morning_0001_0.jpg 1", "0000/0000_001_03_0303morning_0002_0.jpg 0"],
}


def msmt17(root: Path, train: str = "train", test: str = "test") -> Path:
    """Lists and (empty) images of MSMT17 V1, or V2 by the names of its folders."""
    for file, lines in MSMT17_LINES.items():
        folder = train if file in ("list_train.txt", "list_val.txt") else test
        touch(root, *(f"{folder}/{line.split()[0]}" for line in lines))
        (root / file).write_text("\n".join(lines) + "\n")
    return root


def labels(images) -> list[tuple[int, int]]:
    return [(image.person, image.camera) for image in images]


def names(images) -> list[str]:
    return [image.path.name for image in images]
