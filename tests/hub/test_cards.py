"""Laws of cards: they say what the run left, metadata is the Hub's, licenses follow the base, commands exist."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import NANO, ROOT, encoder_config
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, TrainingArguments
from yaml import safe_load

from modeling_gemma_encoder._scripts.provenance import masked, provenance
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments
from modeling_gemma_encoder.finetuning.suite import args_of_run
from modeling_gemma_encoder.hub.licenses import GEMMA_NOTICE, license_of, notice
from modeling_gemma_encoder.hub.model_card import CardRequest, ModelFacts, make_card
from modeling_gemma_encoder.hub.run_record import RunRecord, add_ranking, read_run_record

TEMPLATE = ROOT / "model_cards" / "template.md"


@pytest.fixture
def classified(tmp_path):
    folder = tmp_path / "rte" / "seed-2"
    folder.mkdir(parents=True)
    began = {"task": "rte", "texts": ["premise", "hypothesis"], "learning_rate": 2e-5, "bf16": True, "seed": 2}
    found = {"task": "rte", "rows": {"train": 2490, "validation": 277}, "steps": 780, "command": "python glue.py"}
    found |= {"scores": {"validation": {"accuracy": 0.715}}, "majority": {"validation": {"accuracy": 0.527}}}
    summary = {
        "task": "rte",
        "split": "validation",
        "metric": "accuracy",
        "seeds": [1, 2],
        "mean": 0.71,
        "deviation": 0.01,
    }
    (folder / "run.json").write_text(json.dumps(began))
    (folder / "results.json").write_text(json.dumps(found))
    (tmp_path / "results.json").write_text(json.dumps({"summary": [summary]}))
    return folder


def card_of(run, architecture="GemmaEncoderForSequenceClassification", **options) -> ModelCard:
    config = encoder_config(architectures=[architecture], num_labels=2)
    revision = options.pop("revision", None)
    form = {"base": "google/gemma-2-2b", "license": "gemma", "parameters": 12, "dtypes": {"F32": 3}, **options}
    facts = ModelFacts(config, AutoTokenizer.from_pretrained(NANO), **form)
    return make_card(CardRequest(TEMPLATE, "me/model", run), facts, revision)


def test_a_classifiers_card_says_what_the_run_left(classified):
    card = card_of(read_run_record(classified), revision="0" * 40)
    text = str(card)
    assert "| accuracy | 71.5 | 71.0 ± 1.0, seeds 1, 2 | 52.7 |" in text
    assert "rte, validation, 277 rows" in text and "python glue.py" in text
    assert "| training rows | 2490 |" in text and "| steps | 780 |" in text and "bf16 autocast" in text
    assert '"text_pair"' in text and f'"revision": "{"0" * 40}", "trust_remote_code": True' in text
    metadata = safe_load(text.split("---")[1])
    assert metadata["base_model"] == "google/gemma-2-2b" and metadata["base_model_relation"] == "finetune"
    assert metadata["pipeline_tag"] == "text-classification" and metadata["license"] == "gemma"
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "value": 0.715} and result["dataset"]["split"] == "validation"


def test_a_table_of_ones_own_has_the_recipes_mean_too(classified):
    """`classify.py` has a folder a seed, and none a task."""
    summary = json.loads((classified.parent.parent / "results.json").read_text())
    (classified.parent.parent / "results.json").unlink()
    (classified.parent / "results.json").write_text(json.dumps(summary))
    assert "| accuracy | 71.5 | 71.0 ± 1.0, seeds 1, 2 | 52.7 |" in str(card_of(read_run_record(classified)))


def test_every_run_has_a_repository_of_its_own(tmp_path):
    args = TrainingArguments(str(tmp_path / "mine"), push_to_hub=True, report_to="none", use_cpu=True)
    of_glue = args_of_run(args, tmp_path / "mine" / "cola" / "seed-1", 1, "cola")
    of_table = args_of_run(args, tmp_path / "mine" / "seed-1", 1, "classify")
    assert (of_glue.hub_model_id, of_table.hub_model_id) == ("mine-cola-seed-1", "mine-classify-seed-1")
    args.hub_model_id = "me/it"
    assert args_of_run(args, tmp_path / "mine" / "seed-1", 1, "classify").hub_model_id == "me/it-classify-seed-1"


def test_a_split_of_unknown_size_has_a_table_too(classified):
    found = json.loads((classified / "results.json").read_text())
    scores = {**found["scores"], "test": {"accuracy": 0.5}}
    (classified / "results.json").write_text(json.dumps({**found, "scores": scores}))
    text = str(card_of(read_run_record(classified)))
    assert "| rte, validation, 277 rows, x 100 |" in text and "| rte, test, x 100 |" in text


def test_a_card_says_which_rows_of_a_table_were_scored(classified):
    """A model trained on one file is scored on others, or on rows of it that were held out."""
    found = json.loads((classified / "results.json").read_text()) | {"task": "train.csv", "majority": {}}
    found["scores"] = {"validation": {"accuracy": 0.75}, "test": {"accuracy": 0.5}}
    found["rows"] = {"train": 90, "validation": 10, "test": 1200}
    found["sources"] = {
        "validation": {"data": "train.csv", "part": "a tenth of each class"},
        "test": {"data": "new.csv"},
    }
    (classified / "results.json").write_text(json.dumps(found))
    text = str(card_of(read_run_record(classified)))
    assert "| validation: a tenth of each class of train.csv, held out, 10 rows, x 100 |" in text
    assert "| test: new.csv, 1,200 rows, x 100 |" in text
    results = safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert [(one["dataset"]["type"], one["dataset"]["name"], one["dataset"]["split"]) for one in results] == [
        ("train.csv", "a tenth of each class of train.csv, held out", "validation"),
        ("new.csv", "new.csv", "test"),
    ]
    for source, said, split in (
        ({"split": "dev"}, "me/data, split 'dev'", "dev"),
        ({"split": "train", "part": "a tenth"}, "a tenth of me/data, split 'train', held out", "validation"),
    ):
        found["sources"] = {"validation": {"data": "me/data", **source}}
        (classified / "results.json").write_text(json.dumps(found))
        text = str(card_of(read_run_record(classified)))
        assert f"| validation: {said}, 10 rows, x 100 |" in text
        dataset = safe_load(text.split("---")[1])["model-index"][0]["results"][0]["dataset"]
        assert (dataset["type"], dataset["split"]) == ("me/data", split)


@pytest.mark.parametrize(
    ("left", "problem", "head", "row"),
    [
        ({"summary", "majority"}, None, "this model | the same recipe | most frequent answer", "| 71.5 | 71.0 ± 1.0"),
        ({"summary"}, None, "this model | the same recipe", "71.5 | 71.0 ± 1.0, seeds 1, 2"),
        ({"majority"}, None, "this model | most frequent answer", "71.5 | 52.7"),
        ({"majority"}, "regression", "this model | training mean", "71.5 | 52.7"),
        (set(), None, "this model", "71.5"),
    ],
)
def test_a_cards_columns_hold_something_and_say_what(classified, left, problem, head, row):
    """Also where a model was trained elsewhere, or by one seed; who guesses a number says the training mean."""
    found = json.loads((classified / "results.json").read_text())
    if "summary" not in left:
        (classified.parent.parent / "results.json").unlink()
    if "majority" not in left:
        del found["majority"]
    (classified / "results.json").write_text(json.dumps(found))
    began = json.loads((classified / "run.json").read_text())
    (classified / "run.json").write_text(json.dumps({**began, "problem": problem}))
    (table,) = read_run_record(classified).results
    lines = table.splitlines()
    columns = head.count("|") + 1
    assert lines[0] == f"| rte, validation, 277 rows, x 100 | {head} |" and row in lines[2]
    assert lines[1] == "| --- |" + " ---: |" * columns and lines[2].count("|") == columns + 2


def test_a_rerankers_card_has_its_baselines(tmp_path):
    means = {"Gemma Encoder": {"nDCG@10": 0.5, "RR@10": 0.25}, "BM25": {"nDCG@10": 0.625, "RR@10": 0.75}}
    (tmp_path / "dl2020").mkdir()
    (tmp_path / "dl2020" / "results.json").write_text(json.dumps({"means": means, "queries": 54}))
    (tmp_path / "training.json").write_text(json.dumps({"history": [{"step": 3}], "command": "python msmarco.py"}))
    card = card_of(read_run_record(tmp_path), "GemmaEncoderForRanking")
    text = str(card)
    assert "| dl2020, 54 queries, x 100 | nDCG@10 | RR@10 |" in text
    assert "| Gemma Encoder | 50.0 | 25.0 |\n| BM25 | 62.5 | 75.0 |" in text and "CrossEncoder(" in text
    metadata = safe_load(text.split("---")[1])
    assert metadata["pipeline_tag"] == "text-ranking" and "reranker" in metadata["tags"]
    assert metadata["metrics"] == ["mrr_at_10", "ndcg_at_10"] and "trained on, so" not in text
    (tmp_path / "dl2020" / "results.json").write_text(
        json.dumps({"means": means, "queries": 54, "queries_trained_on": 3})
    )
    text = str(card_of(read_run_record(tmp_path), "GemmaEncoderForRanking"))
    assert "\n\n3 of these 54 queries were also trained on, so this says little of new ones." in text


def test_a_card_names_the_gain_and_sells_no_finding_that_there_is_not():
    found = {"means": {"BM25": {"nDCG@10": 0.5, "AP": 0.5}}, "queries": 9, "gains": {"nDCG@10": "linear"}}
    run = RunRecord()
    add_ranking(run, "a", {**found, "pool": {"warning": None}})
    add_ranking(run, "b", {**found, "pool": {"warning": "random order beats BM25"}})
    assert "| nDCG@10 (linear gain) | AP |" in run.results[0] and "No finding" not in run.results[0]
    assert run.results[1].endswith("\n\nNo finding: random order beats BM25.")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"run": "judged pool", "depth": None}, "the judged pool"),
        ({"run": "bm25", "depth": 100}, "BM25's ranking of the whole collection, the 100 best of each query"),
        ({"run": "bm25"}, "BM25's ranking of the whole collection"),
        ({"run": "/home/ada/runs/dense.trec", "depth": 50}, "the run file `dense.trec`, the 50 best of each query"),
        ({"run": "its own", "depth": None}, "the candidates that come with the data set"),
    ],
)
def test_a_rerankers_card_says_what_was_reranked(facts, said):
    pool = {"candidates": 1200, "relevant": 300, "relevant_share": 0.25, "relevance_level": 1, "warning": None}
    run, found = RunRecord(), {"means": {"BM25": {"AP": 0.5}}, "queries": 12, **facts, "pool": pool}
    add_ranking(run, "a", found)
    add_ranking(run, "b", {**found, "pool": {**pool, "relevance_level": 2}})
    assert run.results[0].endswith(f"\n\nReranked: {said}; 1,200 passages, 300 of them relevant (25.0%).")
    assert run.results[1].endswith(" 300 of them relevant (25.0%, from grade 2 on).")
    add_ranking(run, "c", {"means": {"BM25": {"AP": 0.5}}, "queries": 12, "pool": pool})  # as it was once written
    assert "Reranked" not in run.results[2]


def test_a_card_of_few_queries_says_that_they_are_too_few():
    """Nine are, ten are not; where no difference is claimed anyway, that is what is said."""
    run, found = RunRecord(), {"means": {"BM25": {"AP": 0.5}}, "queries": 9, "pool": {"warning": None}}
    few = {"AP, Gemma Encoder - BM25": {"difference": 0.1, "queries": 9, "p": None, "interval": None, "too_few": True}}
    enough = {"AP, Gemma Encoder - BM25": {**few["AP, Gemma Encoder - BM25"], "too_few": False}}
    add_ranking(run, "a", {**found, "compared": few})
    add_ranking(run, "b", {**found, "compared": enough})
    add_ranking(run, "c", {**found, "compared": few, "pool": {"warning": "random order beats BM25"}})
    assert run.results[0].endswith("\n\n9 queries are too few for more than these means.")
    assert "too few" not in run.results[1] and "too few" not in run.results[2]


def test_results_from_elsewhere_are_added(tmp_path):
    run = RunRecord()
    add_ranking(run, "dl2023", {"means": {"Gemma Encoder": {"AP": 0.125}}, "queries": 25})
    assert "| dl2023, 25 queries, x 100 | AP |" in run.results[0] and run.scores[0].metric_value == 0.125


def test_a_card_without_results_says_so():
    text = str(card_of(RunRecord()))
    assert "None were measured" in text and "Nothing was left beside the model" in text
    assert str(card_of(RunRecord(), adapter=True)).count("base_model_relation: adapter") == 1
    assert "The local checkpoint `nano`" in str(card_of(RunRecord(), base=str(NANO)))
    assert "base_model" not in str(card_of(RunRecord(), base=str(NANO)))  # a folder is no name on the Hub


def test_secrets_stay_out_of_cards(classified, monkeypatch):
    secret = "hf_abcdEFGH"
    for given in (f"--hub_token {secret} --seed 1", f"--hub_token={secret} --seed 1", f"--api-key x{secret} --seed 1"):
        assert secret not in masked(f"python glue.py {given}") and masked(given).endswith("--seed 1")
    kept = "python uptrain.py --mask_token '<unused1>' --tokens_per_batch 9"
    assert masked(kept) == kept
    monkeypatch.setattr(sys, "argv", ["glue.py", "--hub_token", "abc"])
    assert provenance()["command"] == "python glue.py --hub_token ..."
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / "examples" / "glue.py"), "--bf16"])
    assert provenance()["command"] == "python examples/glue.py --bf16"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/glue.py"])
    assert provenance()["command"] == "python glue.py"
    found = json.loads((classified / "results.json").read_text())
    (classified / "results.json").write_text(json.dumps({**found, "command": f"python glue.py --token {secret}"}))
    assert secret not in str(card_of(read_run_record(classified)))


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("--data_dir=/home/ada/x --model /home/adam", "--data_dir=x --model adam"),
        ("--model ~/models/mine/ --output_dir ./runs/x", "--model mine --output_dir x"),
        ("--train_file data/train.csv --model runs/glue/sst2/seed-1", "--train_file train.csv --model seed-1"),
        ("--train_data 'my places/here now/beir:test'", "--train_data beir:test"),
        ("--model examples/nano --seed 1", "--model nano --seed 1"),  # a folder that is here
        ("--model google/gemma-2-2b --bf16", "--model google/gemma-2-2b --bf16"),
        (
            "--model owner/repo/model-Q4.gguf --learning_rate 1e-3",
            "--model owner/repo/model-Q4.gguf --learning_rate 1e-3",
        ),
        ("--model /x/model-Q4.gguf", "--model model-Q4.gguf"),
        (
            "--text Salesforce/wikitext:wikitext-103-raw-v1:validation",
            "--text Salesforce/wikitext:wikitext-103-raw-v1:validation",
        ),
        ("--template 'Question: {first}/{second} or so'", "--template 'Question: {first}/{second} or so'"),
        ("""--table_flags '--validation_file /home/ada/b.csv'""", "--table_flags '--validation_file b.csv'"),
        ("""--fsdp_config '{"file": "/home/ada/b.json"}'""", """--fsdp_config '{"file": "b.json"}'"""),
        ("--ddp https://hub.co/a/b", "--ddp https://hub.co/a/b"),
    ],
)
def test_places_on_a_machine_stay_out_of_commands(given, left, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert masked(f"python examples/glue.py {given}").replace("'beir:test'", "beir:test") == (
        f"python examples/glue.py {left}"
    )
    assert masked(f"python /home/ada/glue.py {given}").startswith("python glue.py ")


def test_places_on_a_machine_stay_out_of_cards(tmp_path, monkeypatch):
    """Whether they are still there or not."""
    monkeypatch.chdir(tmp_path)
    for folder in ("here/decoder", "here/data", "model"):
        (tmp_path / folder).mkdir(parents=True)
    for base in ("here/decoder", "here/gone", "not/any/more", "/not/here", str(tmp_path / "here" / "decoder")):
        for data in ("here/data", "deep/gone/data", "/gone/data", "~/data", "gone/data.csv"):
            run = {"train_data": [data], "model": base, "seed": 1}
            (tmp_path / "model" / "run.json").write_text(json.dumps(run))
            told = {"command": f"python examples/msmarco.py --model {base} --train_data {data} --output_dir runs/x/y"}
            (tmp_path / "model" / "training.json").write_text(json.dumps(told))
            card = str(card_of(read_run_record(tmp_path / "model"), "GemmaEncoderForRanking", base=base, license="mit"))
            for place in (str(tmp_path), f"{base} ", f"{base}`", f"{base}\n", "gone/", "deep/", "~/", "runs/"):
                if place.strip() != "here/gone":  # as a flag it could be a repository's name
                    assert place not in card, (base, data, place)
            assert "base_model" not in card and f"| data | {Path(data).name} |" in card
    assert "base_model: google/gemma-2-2b" in str(card_of(RunRecord()))
    (tmp_path / "google").mkdir()  # a folder of that name here hides nothing
    assert "base_model: me/mine" in str(card_of(RunRecord(), base="me/mine"))
    (tmp_path / "here" / "decoder" / "README.md").write_text("---\nbase_model: /home/ada/gemma\n---\n")
    assert "ada" not in str(card_of(RunRecord(), base="here/decoder"))


def test_a_regressor_is_not_called_a_classifier(tmp_path):
    began = {"task": "stars.csv", "texts": ["text"], "problem": "regression"}
    found = {"task": "stars.csv", "scores": {"validation": {"pearson": 0.5}}}
    (tmp_path / "run.json").write_text(json.dumps(began))
    (tmp_path / "results.json").write_text(json.dumps(found))
    for problem in ("regression", None):  # one output is a number, as upstream has it
        config = encoder_config(architectures=["GemmaEncoderForSequenceClassification"], num_labels=1)
        config.problem_type, config.id2label = problem, {0: "stars"}
        form = {"base": "google/gemma-2-2b", "license": "gemma", "parameters": 12, "dtypes": {"F32": 3}}
        tokenizer = AutoTokenizer.from_pretrained(NANO)
        request = CardRequest(TEMPLATE, "me/it", read_run_record(tmp_path))
        text = str(make_card(request, ModelFacts(config, tokenizer, **form)))
        assert "trained as a regressor" in text and "| number | stars |" in text and "numbers = model(" in text
        assert not re.search("classifier|classify|text-classification|pipeline", text, re.IGNORECASE)
        metadata = safe_load(text.split("---")[1])
        assert metadata["model-index"][0]["results"][0]["task"]["type"] == "text-regression"
    classifier = str(card_of(RunRecord()))
    assert "trained as a classifier" in classifier and "pipeline_tag: text-classification" in classifier


def test_the_license_is_the_bases(tmp_path):
    assert license_of(str(NANO), "gemma2") == "apache-2.0"  # its card says
    assert license_of(str(tmp_path), "gemma2") == license_of(str(tmp_path), "gemma3_text") == "gemma"
    assert license_of(str(tmp_path), "gemma4_text") == "apache-2.0"
    assert license_of("google/not-to-be-had", "gemma2") == "gemma"
    with pytest.raises(ValueError, match="Gemma Terms"):  # a card that cannot be read allows nothing
        license_of("google/not-to-be-had", "gemma2", "mit")
    with pytest.raises(ValueError, match=r"decoders of llama have several\. Give it with --license"):
        license_of(str(tmp_path), "llama")
    assert license_of(str(tmp_path), "llama", "llama3.2") == "llama3.2"
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert license_of(str(tmp_path), "gemma2") == "gemma"
    with pytest.raises(ValueError, match="--license mit"):
        license_of(str(tmp_path), "gemma2", "mit")
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    assert license_of(str(tmp_path), "llama") == "llama3.2"
    with pytest.raises(ValueError, match=r"is under llama3\.2"):
        license_of(str(tmp_path), "llama", "mit")
    assert notice("google/gemma-2-2b", "gemma").startswith(GEMMA_NOTICE) and notice("x", "apache-2.0") is None


def test_commands_of_our_cards_have_only_flags_that_exist():
    """Of scripts in examples/, by their dataclasses and Trainer's."""
    sources = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    shared = {*TrainingArguments.__dataclass_fields__, *FineTuningArguments.__dataclass_fields__}
    names = ("finetuning/suite.py", "finetuning/arguments.py", "ranking/arguments.py", "_scripts/command_line.py")
    names += ("ablations/arguments.py", "pretraining/corpus.py", "finetuning/arguments.py")
    suite = "".join((ROOT / "modeling_gemma_encoder" / name).read_text() for name in names)
    seen = 0
    for card in (ROOT / "model_cards").glob("*.md"):
        for block in re.findall(r"```bash\n(.*?)```", card.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                script = next(
                    (Path(word).name for word in words if word.startswith("examples/") and ".py" in word), None
                )
                if script is None:
                    continue
                flags = [word[2:] for word in words[words.index(f"examples/{script}") :] if word.startswith("--")]
                for flag in flags:
                    own = re.search(rf'\b{flag}: |"--{flag}"', sources[script] + suite)
                    assert flag in shared or own, f"{card.name}: {script} has no --{flag}"
                    seen += 1
    assert seen > 30


def test_a_local_bases_card_says_what_it_was_made_of(tmp_path):
    """As `make gemma` leaves one: the license holds, and the origin is not the folder's name."""
    folder = tmp_path / "my-gemma"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: gemma\nbase_model: google/gemma-3-270m\n---\n")
    (folder / "x.gguf").touch()
    for base in (folder, folder / "x.gguf"):
        assert license_of(str(base), "gemma3_text") == "gemma"
        with pytest.raises(ValueError, match="under the Gemma Terms of Use"):
            license_of(str(base), "gemma3_text", "mit")
    card = str(card_of(RunRecord(), base=str(folder)))
    assert "base_model: google/gemma-3-270m" in card and "by way of the local checkpoint `my-gemma`" in card
    text = notice(str(folder), "gemma")
    assert "derived from google/gemma-3-270m, by way of my-gemma:" in text and str(tmp_path) not in text
