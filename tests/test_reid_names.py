"""Names of image files: every set's form, cameras of any digits, numbers too large, and whatever else a name may be."""

import re
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personmae.data.reid import names
from personmae.data.reid.names import MAX_LABEL, Who, parse_cuhk01, parse_cuhk03, parse_grid, parse_leading, parse_market, parse_msmt17, parse_prid

PARSERS = [parse_market, parse_msmt17, parse_grid, parse_cuhk03, parse_cuhk01, partial(parse_leading, camera=0), partial(parse_prid, camera=1)]


@pytest.mark.parametrize(
    ("parse", "name", "who"),
    [
        (parse_market, "0001_c1s1_001051_00.jpg", (1, 1)),
        (parse_market, "-1_c3s2_000401_03.jpg", (-1, 3)),
        (parse_market, "0005_c2_f0046985.jpg", (5, 2)),
        (parse_market, "1234_c14_0012.jpg", (1234, 14)),
        (parse_market, "0001_c1_1.png", (1, 1)),
        (parse_market, "-2_c1s1_0.jpg", None),
        (parse_market, "0001_c1x.jpg", None),
        (parse_market, "run_2024_c3.jpg", None),
        (parse_market, "٣_c1_0.jpg", None),
        (parse_market, f"{2**62}_c1_0.jpg", (2**62, 1)),
        (parse_market, f"{2**62 + 1}_c1_0.jpg", None),
        (parse_market, "9" * 5000 + "_c1_0.jpg", None),
        (parse_market, "1_c" + "9" * 30 + "_0.jpg", None),
        (parse_msmt17, "0000_000_01_0303morning_0015_0.jpg", (0, 1)),
        (parse_msmt17, "1040_012_15_0303noon_1_0_ex.jpg", (1040, 15)),
        (parse_msmt17, "0000_000.jpg", None),
        (parse_cuhk03, "1_001_1_01.png", (10_001, 1)),
        (parse_cuhk03, "5_843_2_10.png", (50_843, 2)),
        (parse_cuhk03, "1_001_3_01.png", None),
        (parse_cuhk01, "0971004.png", (971, 2)),
        (parse_cuhk01, "0971002.png", (971, 1)),
        (parse_cuhk01, "09710041.png", None),
        (parse_grid, "0001_1_25004_107_32_106_221.jpeg", (1, 1)),
        (parse_grid, "0000_8_25004_107_32_106_221.jpeg", (0, 8)),
        (partial(parse_leading, camera=2), "000_45.bmp", (0, 2)),
        (partial(parse_leading, camera=1), "119.jpg", (119, 1)),
        (partial(parse_leading, camera=1), "a1.jpg", None),
        (partial(parse_prid, camera=1), "person_0200.png", (200, 1)),
        (partial(parse_prid, camera=1), "person_0200a.png", None),
    ],
)
def test_names(parse, name, who):
    assert parse(name) == who


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    for parse in PARSERS:
        found = parse(text)
        assert found is None or (isinstance(found, Who) and -1 <= found.person <= MAX_LABEL and 0 <= found.camera <= MAX_LABEL)


@given(st.from_regex(re.compile(r"(-1|[0-9]{1,22})_c[0-9]{1,22}(s[0-9]+)?[_.].*", re.ASCII), fullmatch=True))
def test_market_names_mean_their_numbers(name):
    person, camera = re.match(r"(-1|[0-9]+)_c([0-9]+)", name).groups()
    expected = (int(person), int(camera))
    assert parse_market(name) == (expected if max(expected) <= MAX_LABEL and max(len(person), len(camera)) <= 19 else None)


@given(st.integers())
def test_labels(number):
    expected = number if abs(number) <= MAX_LABEL else None
    assert names.read_label(str(number)) == expected
    assert names.read_label(f"{number} ") is None
