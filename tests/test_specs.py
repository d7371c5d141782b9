"""Spec strings: read, written canonically, read again."""

import contextlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kdcache.records.errors import SpecError
from kdcache.records.specs import Spec, Value

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=6)
KEYS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z0-9_./-]{1,12}", fullmatch=True)
SPECS = st.builds(
    Spec, source=st.sampled_from(["", "torchvision", "py", "hf2"]), name=NAMES, options=st.dictionaries(KEYS, VALUES, max_size=4)
)


@pytest.mark.parametrize(
    ("text", "source", "name", "options"),
    [
        ("small", "", "small", {}),
        ("  small  ", "", "small", {}),
        ("torchvision:resnet50,num_classes=10", "torchvision", "resnet50", {"num_classes": 10}),
        ("topk,temperatures=(1,2,4),k=16", "", "topk", {"k": 16, "temperatures": (1, 2, 4)}),
        ("x,a=[1,[2,3]]", "", "x", {"a": (1, (2, 3))}),
        ("py:mylab.nets:build,width=2", "py", "mylab.nets:build", {"width": 2}),
        ("x, a = 1 , b = True", "", "x", {"a": 1, "b": True}),
        ("x,a=None,b=1e-3,c=-2,d=text,e=1.2.3", "", "x", {"a": None, "b": 0.001, "c": -2, "d": "text", "e": "1.2.3"}),
        ("x,a='1',b=\"True\",c=''", "", "x", {"a": "1", "b": "True", "c": ""}),
        ("x,a='1,2',b=k=v", "", "x", {"a": "1,2", "b": "k=v"}),
        ("x,image-size=8", "", "x", {"image_size": 8}),
        ("folder:/data/train images", "folder", "/data/train images", {}),
        ("C:/data", "", "C:/data", {}),
        ("torchvision:CIFAR10,root=/data/x y,train=False", "torchvision", "CIFAR10", {"root": "/data/x y", "train": False}),
    ],
)
def test_parse(text: str, source: str, name: str, options: dict[str, Value]) -> None:
    """A spec string gives its source, its name and its options as Python literals, else strings."""
    assert Spec.parse(text) == Spec(source=source, name=name, options=options)
    assert {key: type(value) for key, value in Spec.parse(text).options.items()} == {key: type(value) for key, value in options.items()}


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("small", "small"),
        ("x,b=2,a=1", "x,a=1,b=2"),
        ("x, t = ( 1, 2.0 )", "x,t=(1,2.0)"),
        ("x,a=[1]", "x,a=(1,)"),
        ("x,a='text',b='1',c='a,b'", "x,a=text,b='1',c='a,b'"),
        ("py:m:f,flag=True", "py:m:f,flag=True"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    """However a spec is typed, its string is sorted, without needless quotes and white space, and a fixed point."""
    assert str(Spec.parse(text)) == canonical
    assert str(Spec.parse(canonical)) == canonical


@given(spec=SPECS)
@example(spec=Spec(source="", name="x", options={"a": "x'y\"z", "b": 1}))
@example(spec=Spec(source="", name="x", options={"a": "1j"}))
@example(spec=Spec(source="", name="x", options={"a": "{}"}))
@example(spec=Spec(source="", name="x", options={"a": ("two words",)}))
def test_round_trip(spec: Spec) -> None:
    """Reading what a spec writes gives the spec again, whatever its options hold."""
    again = Spec.parse(str(spec))
    assert again == spec
    assert str(again) == str(spec)


@given(spec=SPECS)
def test_order_of_options_does_not_matter(spec: Spec) -> None:
    """Two specs with the same options have the same string, so they hash equally."""
    turned = Spec(source=spec.source, name=spec.name, options=dict(reversed(spec.options.items())))
    assert str(turned) == str(spec)


@given(text=st.text(max_size=40))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    """Whatever is typed, the answer is a spec with a name and a string of its own, or a SpecError."""
    with contextlib.suppress(SpecError):
        spec = Spec.parse(text)
        assert spec.name
        assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no name"),
        (",a=1", "has no name"),
        ("torchvision:", "has no name"),
        ("x,a", "expected key=value"),
        ("x,", "expected key=value"),
        ("x,1a=2", "expected key=value"),
        ("x,=2", "expected key=value"),
        ("x,a=1,a=2", "'a' is given twice"),
        ("x,a-b=1,a_b=2", "'a_b' is given twice"),
        ("x,a={'b': 1}", "expected None, True, False"),
        ("x,a=(1,{2})", "expected None, True, False"),
    ],
)
def test_what_is_no_spec_is_refused(text: str, message: str) -> None:
    """A spec without a name, with half an option, an option twice or a value of another kind is a SpecError that says what was expected."""
    with pytest.raises(SpecError, match=re.escape(message)):
        Spec.parse(text)


@pytest.mark.parametrize("text", ["folder:/it's,train=True", "folder:/a)b,train=True", "x,a=(1,b=2"])
def test_unbalanced_quotes_and_brackets_swallow_no_option(text: str) -> None:
    """An option after a stray quote or bracket is either read or refused, never taken for a part of the text before."""
    try:
        spec = Spec.parse(text)
    except SpecError:
        return
    assert spec.options.keys() & {"train", "b"}


@pytest.mark.parametrize("text", ["x,a=1e999", "x,a=-1e999", "x,a=(1e999,)"])
def test_infinite_values_round_trip_or_are_refused(text: str) -> None:
    """A number too large for a float is refused, or is the same number when it is read again."""
    try:
        spec = Spec.parse(text)
    except SpecError:
        return
    assert Spec.parse(str(spec)) == spec


def test_white_space_around_the_name_means_nothing() -> None:
    """Blanks before the first comma are no part of the name, as they are none of a key or a value."""
    assert Spec.parse("small ,k=1") == Spec.parse("small,k=1")


def test_options_are_set_without_changing_the_spec() -> None:
    """Setting, defaulting and removing options give new specs and leave the old one as it was."""
    spec = Spec.parse("x,a=1,b=2")
    assert str(spec.with_options(a=3, c=4)) == "x,a=3,b=2,c=4"
    assert str(spec.with_defaults(a=3, c=4)) == "x,a=1,b=2,c=4"
    assert str(spec.without_options("a", "z")) == "x,b=2"
    assert str(spec) == "x,a=1,b=2"


def test_unknown_options_are_named_with_the_known_ones() -> None:
    """Options that nothing reads are refused, all of them by name, and the message lists what is taken."""
    spec = Spec.parse("x,a=1,c=2,d=3")
    spec.reject_unknown_options("a", "b", "c", "d")
    with pytest.raises(SpecError, match=re.escape("unknown option c, d; x takes: a, b")):
        spec.reject_unknown_options("b", "a")
