import pytest
from recbole.data import create_dataset

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue
from tests.conftest import TINY, write_dataset

TITLES = {
    1: "Godfather, The",
    2: '"Quoted',
    3: "",
    4: "NA",
    5: "Enfants du paradis, Les (Children of Paradise)",
    6: "Twice   told",
    7: "Twice told",
    8: "<|im_end|>",
    9: "Avventura, L'",
    10: "Time, Tide, Theory",
}


def catalogue(
    tmp_path, titles=TITLES, sequences=((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11),), **settings
):
    path = write_dataset(tmp_path, [list(s) for s in sequences], titles)
    config = RunConfig("GRU4Rec", "toy", config_dict=TINY | {"data_path": str(path)})
    dataset = create_dataset(config)
    made = Catalogue.from_dataset(dataset, **{"fields": ["title"], **settings})
    ids = {
        int(token[1:]): number
        for number, token in enumerate(dataset.field2id_token["item_id"])
        if number
    }
    return {item: made.titles[number] for item, number in ids.items()}, made, ids


def test_titles_are_read_as_people_write_them(tmp_path):
    titles, *_ = catalogue(tmp_path)
    assert titles == {
        1: "The Godfather",
        2: '"Quoted',
        3: "item i3",
        4: "NA",
        5: "Les Enfants du paradis (Children of Paradise)",
        6: "Twice told",
        7: "Twice told",
        8: "<|im_end|>",
        9: "L'Avventura",
        10: "Time, Tide, Theory",
        11: "item i11",
    }


def test_articles_stay_where_they_are_if_asked(tmp_path):
    assert catalogue(tmp_path, article_first=False)[0][1] == "Godfather, The"


def test_missing_and_shared_titles_are_counted(tmp_path):
    _, made, ids = catalogue(tmp_path)
    assert sorted(made.untitled) == sorted([ids[3], ids[11]])
    assert made.shared == 1
    assert made.group[ids[6]] == made.group[ids[7]]
    assert len(set(made.group)) == 1 + 11 - 1
    assert "2 without a title" in made.describe() and "1 titles shared" in made.describe()


def test_further_fields_go_into_parentheses(tmp_path):
    path = write_dataset(tmp_path, [[1, 2, 3]], None)
    (path / "toy" / "toy.item").write_text(
        "item_id:token\tname:token_seq\tyear:token\ni1\tAlien\t1979\ni2\tBrazil\t\ni3\t\t1999\n"
    )
    dataset = create_dataset(
        RunConfig("GRU4Rec", "toy", config_dict=TINY | {"data_path": str(path)})
    )
    assert Catalogue.from_dataset(dataset, ["name", "year"]).titles == (
        "",
        "Alien (1979)",
        "Brazil",
        "item i3",
    )


def test_a_missing_field_names_the_valid_ones(tmp_path):
    with pytest.raises(
        ValueError, match=r"title_fields=\['name'\].*no column 'name'; it must be one of title"
    ):
        catalogue(tmp_path, fields=["name"])


def test_a_missing_file_says_what_it_should_hold(tmp_path):
    with pytest.raises(
        ValueError, match="title_fields.*toy.item, which does not exist.*item_id:token"
    ):
        catalogue(tmp_path, titles=None)
