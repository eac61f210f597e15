"""neaptide.yaml: strict, and every refusal says where and what to type."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.config import DEFAULT_TEXT, Settings, host_port, load, parse
from neaptide.control.desired import difference, redacted
from neaptide.elastic import span_s
from neaptide.errors import ConfigError


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, "neaptide.yaml")
    assert caught.value.exit_code == 2
    return caught.value


def test_the_default_text_serves_the_built_in_model() -> None:
    settings = parse(DEFAULT_TEXT, "x")
    assert list(settings.models) == ["guide"]
    assert settings.models["guide"].scale.min == 1


@pytest.mark.parametrize(("written", "most"), [("{}", 1), ("{min: 3}", 3), ("{min: 0}", 1), ("{min: 0, max: 0}", 0)])
def test_a_model_without_a_maximum_runs_its_minimum_and_at_least_one(written: str, most: int, tmp_path: Path) -> None:
    file = tmp_path / "neaptide.yaml"
    file.write_text(f"models: {{guide: {{scale: {written}}}}}\n")
    assert load(file).models["guide"].scale.max == most


def test_the_documented_example_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-remote\n")
    text = f"""
listen: 127.0.0.1:8000
admin: {{listen: 127.0.0.1:8001}}
models:
  guide: {{}}
  mock:
    replicas: [{{url: "http://127.0.0.1:9101/v1", model: remote-id, key: "file:{tmp_path}/key", max_running: 64}}]
    aliases: [gpt-4o-mini]
  small:
    source: ./models/small-int4-ov
    engine: openvino
    scale: {{min: 0, max: 4}}
    slo: {{ttft_s: 1.0, tpot_s: 0.05, attainment: 0.99}}
"""
    settings = parse(text, "neaptide.yaml", tmp_path)
    assert settings.models["mock"].replicas[0].key == "sk-remote"
    assert settings.models["small"].source == str(tmp_path / "models/small-int4-ov")


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("modles: {}", "E104", "did you mean 'models'?"),
        ("models: {guide: {scal: {}}}", "E104", "models.guide"),
        ("models: {guide: {scale: {mni: 1}}}", "E104", "models.guide.scale"),
        ("models: {guide: {scale: {min: many}}}", "E105", "models.guide.scale.min"),
        ("models: {guide: {scale: {min: 3, max: 1}}}", "E108", "min 3, max 1"),
        ("models: {guide: {}, guide: {}}", "E102", "stands twice"),
        ("models: {a: {engine: echo, aliases: [b]}, b: {engine: echo}}", "E107", "'b' names both"),
        ("models: {a: {}}", "E108", "neither source nor replicas"),
        ("models: {a: {source: x, replicas: [{url: 'http://h/v1'}]}}", "E108", "replicas beside source"),
        ("models: {a: {replicas: [{url: 'ftp://h'}]}}", "E108", "ftp://h"),
        ("models: {a: {replicas: [{url: 'http://h/v1', key: sk-123}]}}", "E106", "env:NAME or file:PATH"),
        ("models: {a: {replicas: [{url: 'http://h/v1', key: 'env:NO_SUCH_NAME_HERE'}]}}", "E106", "NO_SUCH_NAME_HERE"),
        ("listen: 8000", "E105", "listen"),
        ("listen: nowhere\nmodels: {guide: {}}", "E103", "host:port"),
        ("models: {a: {replicas: [{url: 'http://h/v1'}], scale: {min: 1, max: 2}}}", "E108", "somebody else's"),
        ("models: {guide: {scale: {policy: greedy}}}", "E105", "models.guide.scale.policy"),
        ("models: {guide: {scale: {target: 0}}}", "E108", "target: 0"),
        ("models: {guide: {scale: {target: .nan}}}", "E108", "target: nan"),
        ("models: {guide: {scale: {price_per_hour: -1}}}", "E108", "price_per_hour: -1"),
        ("models: {guide: {scale: {budget_per_hour: 9}}}", "E108", "a budget without a price"),
        ("models: {guide: {scale: {policy: thresholds}}}", "E108", "with 0 rules"),
        ("models: {guide: {scale: {rules: [{signal: waiting, above: 1}]}}}", "E108", "policy slo with 1 rules"),
        ("models: {guide: {scale: {policy: thresholds, rules: [{signal: waiting}]}}}", "E108", "above or below"),
        (
            "models: {guide: {scale: {policy: thresholds, rules: [{signal: waiting, above: 1, add: 0}]}}}",
            "E108",
            "add 0",
        ),
        (
            "models: {guide: {scale: {calendar: [{start: 2026-11-11, end: 2026-11-10, factor: 3}]}}}",
            "E108",
            "before it starts",
        ),
        ("models: {guide: {scale: {calendar: [{start: soon, end: later, factor: 3}]}}}", "E108", "calendar[0]"),
        (
            "models: {guide: {scale: {calendar: [{start: 2026-11-11, end: 2026-11-12, factor: 0}]}}}",
            "E108",
            "factor: 0",
        ),
        ("models: {guide: {}}\ntenants: {acme: {rpm: 0}}", "E108", "tenants.acme.rpm: 0"),
        ("models: {guide: {}}\ntenants: {acme: {tpm: 1.5}}", "E105", "tenants.acme.tpm"),
        ("models: {guide: {gpus: [{url: 'gpu:9400'}]}}", "E108", "gpus[0].url: 'gpu:9400'"),
        ("models: {guide: {gpus: [{url: 'http://me:secret@gpu/metrics'}]}}", "E108", "without a name and password"),
        ("models: {guide: {gpus: [{url: 'http://gpu:port/metrics'}]}}", "E108", "write it as http://host:9400/metrics"),
        ("models: {guide: {gpus: [{url: 'http://gpu/', metric: 'a b'}]}}", "E108", "'a b' is no metric's name"),
        ("models: {guide: {gpus: [{url: 'http://gpu/', metric: gpu_busy}]}}", "E108", "add full: 100"),
        ("models: {guide: {gpus: [{url: 'http://gpu/', full: 0}]}}", "E108", "full: 0"),
        ("models: {guide: {gpus: [{url: 'http://gpu/', labels: {gpu: 0}}]}}", "E105", "gpus[0].labels"),
        (
            "models: {guide: {scale: {policy: thresholds, rules: [{signal: gpu_usage, above: 0.8}]}}}",
            "E108",
            "no exporter tells of it",
        ),
        (
            "models: {guide: {}}\n"
            "pools: {p: {models: [guide], scale: {policy: thresholds, rules: [{signal: gpu_usage, above: 0.8}]}}}",
            "E108",
            "pools.p.scale: a rule on gpu_usage",
        ),
        ("models: {guide: {}}\nledger: {url: 'postgresql://u:sk-123@h/db'}", "E106", "env:NAME or file:PATH"),
        ("models: {guide: {}}\nledger: {url: 'postgresql://u:sk-123/@h/db'}", "E106", "env:NAME or file:PATH"),
        ("models: {guide: {}}\nledger: {url: 'postgresql://h/db?pass%77ord=sk-123'}", "E106", "env:NAME or file:PATH"),
        ("models: {}", "E107", "no models"),
        ("models: [", "E102", "line"),
        ("- a", "E105", "top level"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_fix(text: str, code: str, said: str) -> None:
    error = refusal(text)
    assert error.code == code
    assert said in str(error)
    assert "sk-123" not in str(error)


def test_a_calendar_takes_yaml_times_and_iso_texts_alike() -> None:
    when = "{start: 2026-11-11 20:00:00, end: '2026-11-11T22:00', factor: 3}"
    dates = "{start: 2026-11-12, end: 2026-11-13T00:00:00+08:00, factor: 2, name: sale}"
    settings = parse(f"models: {{guide: {{scale: {{calendar: [{when}, {dates}]}}}}}}", "x")
    first, second = settings.models["guide"].scale.calendar
    start_s, end_s = span_s(first)
    assert end_s - start_s == 7200
    assert second.start == "2026-11-12"
    assert span_s(second)[1] == 1794499200.0  # 2026-11-12T16:00Z


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="E101"):
        load(tmp_path / "none.yaml")


@given(st.text(max_size=200))
def test_any_text_is_settings_or_a_config_error(text: str) -> None:
    try:
        settings = parse(text, "x")
    except ConfigError:
        return
    assert isinstance(settings, Settings)


@pytest.mark.parametrize(
    ("listen", "expected"), [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:80", ("::1", 80)), ("h:65535", ("h", 65535))]
)
def test_addresses_split_into_host_and_port(listen: str, expected: tuple[str, int]) -> None:
    assert host_port(listen) == expected


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h:5432/db", "***@h:5432/db"),
        ("postgresql://u:hun?ter2@hunter2@h/db?password=hunter2@x", "***@h/db"),
        ("postgresql://h/db?user=u&password=hunter2", "postgresql://h/db"),
        ("postgresql://u@h/db", "***@h/db"),
    ],
)
def test_a_databases_password_comes_from_elsewhere_and_is_shown_to_nobody(url: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(url)
    settings = parse(f"models: {{guide: {{}}}}\nledger: {{url: 'file:{tmp_path}/url'}}", "x")
    assert settings.ledger.url == url
    assert redacted(settings)["ledger"] == {"url": shown, "retention_days": 400.0}


def test_what_waits_for_the_next_up_is_named_and_nothing_else(tmp_path: Path) -> None:
    def notes(old: str, new: str) -> list[str]:
        before, after = (parse(f"models: {{guide: {{}}}}\n{text}", "x") for text in (old, new))
        return [note.partition(" ")[0] for note in difference(before, after, {}, dry_run=True).notes]

    for name in ("one", "two"):
        (tmp_path / name).write_text(f"postgresql://u:{name}@h/db")
    assert notes("", "journal: {retention_days: 3}\nledger: {retention_days: 30}") == []
    assert notes("", "journal: {segment_mib: 16, retention_days: 3}") == ["journal.segment_mib"]
    assert notes(*(f"ledger: {{url: 'file:{tmp_path / name}'}}" for name in ("one", "two"))) == ["ledger.url"]
    assert notes("", "gateways: 2\nadmin: {listen: '127.0.0.1:9'}") == ["admin", "gateways"]
    assert notes("", "tls: {cert: a.crt, key: a.key}") == ["tls"]


def test_a_database_without_a_password_may_stand_in_the_file() -> None:
    url = "postgresql://someone@h:5432/db?sslmode=verify-full"
    assert parse(f"models: {{guide: {{}}}}\nledger: {{url: '{url}'}}", "x").ledger.url == url
