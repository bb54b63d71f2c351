import pytest

TEXT = "the cat [sat] on the mat of a [bold]list[int]; x[:1].\n"


@pytest.fixture
def text(tmp_path):
    """A folder with a small text, `my.txt`."""
    (tmp_path / "my.txt").write_text(TEXT * 100)
    return tmp_path
