import json
from pathlib import Path

from harness.config import load_recipe
from harness.run_dir import RunDir, write_json
from harness.tracking import picture, record


def entry(seq: int, kind: str = "metrics", **more: object) -> dict:
    return {"seq": seq, "time": 100.5 + seq, "kind": kind, "stage": "search", "epoch": 1, "step": 10 * seq, **more}


def test_only_what_a_checkpoint_covers_is_settled():
    records = [entry(1), entry(2), entry(3, "checkpoint", covers=2), entry(4), entry(5)]
    assert [r["seq"] for r in record.settled(records, finished=False)] == [1, 2]
    assert [r["seq"] for r in record.settled(records, finished=True)] == [1, 2, 3, 4, 5]
    assert record.settled(records[:2], finished=False) == []


def test_samples_carry_the_record_s_own_time_and_step():
    (one, two) = record.samples([entry(1, metrics={"loss": 0.5, "top1": 3, "note": "text", "flag": True})])
    assert one == record.Sample("loss", 0.5, 101500, 10)
    assert two.value == 3.0


def test_one_curve_of_accuracy_runs_through_all_stages_and_comes_first():
    records = [
        entry(1, metrics={"search/loss": 0.5, "search/top1": 90.0}),
        entry(2, metrics={"finetune/top1": 95.0}) | {"stage": "finetune"},
        entry(3, metrics={"final/top1": 94.0, "final/top5": 99.0}) | {"stage": "report"},
    ]
    found = list(record.samples(records))
    assert found[0].key == "Top-1"
    curve = [(sample.step, sample.value) for sample in found if sample.key == "Top-1"]
    assert curve == [(10, 90.0), (20, 95.0), (30, 94.0)]
    assert sum(sample.key == "final/top1" for sample in found) == 1


def test_what_the_compare_page_takes_first_sorts_before_every_other_parameter():
    added = record.result_params({"gbops": 0.123456, "mean_weight_bits": 2.0, "top1": 1.0})
    assert added == {"GBOPs": "0.1235", "Mean weight bits": "2"}
    config = load_recipe("digits_resnet20", ["search.lambda=0.3"]).to_dict()
    assert sorted(record.params(config) | added)[:2] == ["GBOPs", "Mean weight bits"]


def test_params_are_the_recipe_s_names_and_short_ones():
    config = load_recipe("digits_resnet20", ["search.lambda=0.3"]).to_dict()
    params = record.params(config)
    assert params["lambda"] == "0.3"
    assert "search.lambda" not in params, "the compare view would offer it twice"
    assert params["model"] == "resnet20"
    assert params["seed"] == "0"
    assert params["search.weight_bits"] == "[2, 4, 8]"
    baseline = load_recipe("digits_resnet20", ["search.method=uniform_4", "search.lambda=0.3"]).to_dict()
    assert "lambda" not in record.params(baseline)


def test_a_point_is_the_configuration_without_seed_and_paths():
    def point(*overrides: str) -> str:
        return record.point(load_recipe("digits_resnet20", overrides).to_dict())

    assert point("run.seed=1") == point("run.seed=2", "data.dir=/elsewhere")
    assert point("search.lambda=0.1") != point("search.lambda=0.2")


def test_layer_tables_hold_the_same_cells():
    layers = [{"name": "conv1", "kind": "conv", "weight_bits": 8, "macs": 5, "more": "ignored"}]
    table = record.layer_table(layers)
    header, line = record.layer_csv(layers).splitlines()
    assert header.split(",") == table["columns"]
    assert line.split(",")[:3] == ["conv1", "conv", "8"]
    assert table["data"][0][:3] == ["conv1", "conv", 8]


def test_the_layers_of_a_search_come_out_as_a_table_and_a_picture(tmp_path: Path):
    records = [
        entry(1, metrics={"search/loss": 1.0}, layers=[["conv1", 8, 8, 16, 64e6], ["fc", 8, 8, 10, 1e6]]),
        entry(2, metrics={"search/loss": 0.5}, layers=[["conv1", 2, 4, 12, 6e6], ["fc", 8, 8, 10, 1e6]]),
        entry(3, metrics={"finetune/loss": 0.5}),
    ]
    points = record.layer_history(records)
    assert [(p.step, p.name, p.weight_bits, p.kept_out, p.bops) for p in points if p.name == "conv1"] == [
        (10, "conv1", 8, 16, 64e6),
        (20, "conv1", 2, 12, 6e6),
    ]
    lines = record.history_csv(points).splitlines()
    assert lines[0] == "stage,epoch,step,name,weight_bits,activation_bits,kept_out,bops"
    assert lines[3] == "search,1,20,conv1,2,4,12,6000000.0"
    picture.draw_search(points, tmp_path / "search.png")
    first = (tmp_path / "search.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    picture.draw_search(points[:1], tmp_path / "search.png")  # one epoch, one colour
    assert (tmp_path / "search.png").read_bytes() != first


def test_final_values_are_stamped_with_the_last_record():
    (sample,) = record.final_samples({"top1": 97.5}, [entry(1), entry(4)])
    assert sample == record.Sample("final/top1", 97.5, 104500, 40)


def test_summaries_need_a_result(tmp_path: Path):
    run = RunDir(tmp_path)
    config = load_recipe("digits_resnet20").to_dict()
    write_json(run.config_path, config)
    assert record.summary(run) is None
    write_json(run.result_path, {"key": "k", "top1": 1.0, "model": "resnet20"})
    found = record.summary(run)
    assert found is not None
    assert (found["key"], found["top1"], found["data"], found["point"]) == ("k", 1.0, "digits", record.point(config))
    assert set(found) == set(record.SUMMARY_KEYS)


def test_tags_tell_provenance_and_errors(tmp_path: Path):
    run = RunDir(tmp_path)
    config = load_recipe("digits_resnet20").to_dict()
    starts = [
        {"commit": "old", "dirty": True},
        {"commit": "abc", "dirty": False, "versions": {"torch": "2"}, "job": {}},
    ]
    write_json(run.provenance_path, {"starts": starts})
    write_json(run.path / "trial.json", {"key": "k", "data_checksum": "feed"})
    write_json(run.error_path, {"message": "the loss is nan", "stage": "search"})
    tags = record.tags(run, config)
    assert tags["provenance.commit"] == tags["mlflow.source.git.commit"] == "abc"
    assert (tags["provenance.starts"], tags["provenance.versions.torch"]) == ("2", "2")
    assert tags["harness.data_checksum"] == "feed"
    assert tags["harness.error"] == "the loss is nan"
    assert json.loads(tags["provenance.dirty"]) is False


def test_trials_are_found_from_any_level(tmp_path: Path):
    for sweep, trial in [("a", "t1"), ("a", "t2"), ("b", "t3")]:
        path = tmp_path / sweep / "trials" / trial
        path.mkdir(parents=True)
        write_json(path / "config.json", {})
    assert [run.path.name for run in record.trial_dirs(tmp_path)] == ["t1", "t2", "t3"]
    assert [run.path.name for run in record.trial_dirs(tmp_path / "a")] == ["t1", "t2"]
    assert [run.path.name for run in record.trial_dirs(tmp_path / "a" / "trials" / "t2")] == ["t2"]
