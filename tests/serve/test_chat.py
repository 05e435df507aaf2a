"""Chat templates: a model's own, the default, and hostile ones."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from pathlib import Path

import httpx
import pytest

from meshwright.errors import InputError
from meshwright.serve.errors import RequestError
from meshwright.serve.workers.chat import DEFAULT_TEMPLATE, ChatTemplate, Renderer, read_chat_template

HELLO = [{"role": "user", "content": "hi"}]


def render(source: str, messages=HELLO, special=None) -> str:
    async def go() -> str:
        async with Renderer(ChatTemplate(source, special or {}, own=True), cpu_seconds=0.5) as renderer:
            return await renderer.render(messages)

    return asyncio.run(go())


def test_template_is_found_where_models_keep_it(tmp_path):
    assert read_chat_template(tmp_path) == ChatTemplate(DEFAULT_TEMPLATE, {}, own=False)
    config = {"chat_template": "A", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_chat_template(tmp_path) == ChatTemplate("A", {"bos_token": "<s>", "eos_token": "</s>"}, own=True)
    config["chat_template"] = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_chat_template(tmp_path).source == "D"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert read_chat_template(tmp_path).source == "B"


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 5}', "[" * 100_000])
def test_unreadable_config_is_bad_input(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        read_chat_template(tmp_path)


def test_templates_without_a_default_are_bad_input(tmp_path):
    config = {"chat_template": [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"chat_template: has no template named default, but rag, tool_use; name one"):
        read_chat_template(tmp_path)
    config["chat_template"][1]["name"] = "default"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_chat_template(tmp_path).source == "t"


def test_oversized_template_is_bad_input(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("x" * 300_000)
    with pytest.raises(InputError, match="more than the"):
        read_chat_template(tmp_path)


def test_default_template():
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
    assert render(DEFAULT_TEMPLATE, messages) == "system: short\nuser: hi\nassistant:"


def test_names_and_filters_of_hugging_face_templates():
    source = (
        "{{ bos_token }}{%- for m in messages %}{% if loop.first %}[{{ m['role'] }}]{% endif %}"
        "{% generation %}{{ m.content | trim | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}{{ strftime_now('%Y') | length }}"
    )
    assert render(source, [{"role": "user", "content": " é "}], {"bos_token": "<s>"}) == '<s>[user]"é"<a>4'


#: Templates as real families write them (shortened), and others for each name and filter of `transformers`.
FAMILIES = {
    path.stem: path.read_text("utf-8") for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))
}
CONVERSATIONS = [
    [{"role": "user", "content": " Hi <é> & 'you' "}],
    [
        {"role": "system", "content": "a\nb "},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>x</think>\n\ntwo"},
        {"role": "user", "content": "three\n"},
    ],
]


@pytest.fixture(scope="module")
def bare_tokenizer():
    """A tokenizer of `transformers` without a text: only its special tokens and its templates matter."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    special = {name: f"<{name[:3]}>" for name in ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token")}
    special |= {"pad_token": "<pad>", "mask_token": "<mask>"}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, "<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_run_as_in_transformers(bare_tokenizer, tmp_path, family):
    """From the folder that `transformers` saves to the prompt, for each conversation."""
    bare_tokenizer.chat_template = FAMILIES[family]
    bare_tokenizer.save_pretrained(tmp_path)
    expected = [
        bare_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in CONVERSATIONS
    ]

    async def go() -> list[str]:
        async with Renderer(read_chat_template(tmp_path)) as renderer:
            return [await renderer.render(messages) for messages in CONVERSATIONS]

    assert asyncio.run(go()) == expected


HOSTILE = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "mutation": "{% set _ = messages.append(1) %}x",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{{ 'x' * 10**10 }}",
    "power": "{{ 9 ** (9 ** (8 + messages | length)) }}",
    "long": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "raises": "{{ raise_exception('only one user') }}",
    "include": "{% include '/etc/passwd' %}",
    "undefined": "{{ nothing.there.at.all }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_as_refusals(name):
    with pytest.raises(RequestError) as caught:
        render(HOSTILE[name])
    assert caught.value.status == 400
    assert "0x" not in caught.value.message and "root:" not in caught.value.message
    if name == "raises":
        assert "only one user" in caught.value.message


def test_format_strings_reach_no_attribute():
    assert "class" not in render("{{ '{0.__class__}'.format(1) }}")


def test_template_that_does_not_compile_is_bad_input():
    with pytest.raises(InputError, match="chat template: line 2"):
        render("a\n{% for %}")


def test_renderer_goes_on_after_a_hostile_render():
    async def go() -> list[str]:
        source = "{% if messages[0].content == 'loop' %}" + HOSTILE["endless"] + "{% endif %}ok"
        async with Renderer(ChatTemplate(source, {}, own=True), cpu_seconds=0.5) as renderer:
            with pytest.raises(RequestError):
                await renderer.render([{"role": "user", "content": "loop"}])
            asking = asyncio.create_task(renderer.render([{"role": "user", "content": "loop"}]))
            await asyncio.sleep(0.05)
            asking.cancel()  # its client left
            return list(await asyncio.gather(*(renderer.render(HELLO) for _ in range(5))))

    assert asyncio.run(go()) == ["ok"] * 5


def test_chats_that_wait_for_their_prompt_have_a_place_in_the_queue(start, echo, until):
    """The template keeps its process busy: another chat is refused at once, and the places are free afterwards."""
    server = start(echo(max_batch=1), template=ChatTemplate(HOSTILE["endless"], {}, own=True))
    url, chat = server.url + "/v1/chat/completions", {"messages": HELLO, "n": 5}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, url, json=chat, timeout=60)
        until(lambda: server.model.open_choices == 5)
        refused = httpx.post(url, json=chat, timeout=60)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert first.result().status_code == 400
    assert server.model.open_choices == 0
    whole = {"prompt": "ab", "max_tokens": 2, "n": 9}
    assert httpx.post(server.url + "/v1/completions", json=whole, timeout=60).status_code == 200


def test_endless_template_does_not_hold_up_others(start, echo):
    server = start(echo(), template=ChatTemplate(HOSTILE["endless"], {}, own=True))
    chat = {"messages": HELLO}
    assert httpx.post(server.url + "/v1/chat/completions", json=chat, timeout=60).status_code == 400
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "ab", "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "ab"
