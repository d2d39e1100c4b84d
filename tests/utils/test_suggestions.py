from irdscale.utils.suggestions import nearest


def test_nearest() -> None:
    assert nearest("ratoi", ["ratio", "seeds"]) == ' (did you mean "ratio"?)'
    assert nearest("xyz", ["ratio", "seeds"]) == ""
