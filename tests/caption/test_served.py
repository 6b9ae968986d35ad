"""The client of a served captioner, against servers that behave and that do not."""

import asyncio
import contextlib
import json
import threading
import time

import pytest
from aiohttp import web

from caption.config import Server
from caption.served import Answer, Client, Question, ServerFailed, read


class Fake:
    """A server on loopback whose behaviour is a function of (how often this key was asked, request)."""

    def __init__(self, behave):
        self.behave, self.asked, self.now, self.most, self.requests = behave, {}, 0, 0, []

    async def handle(self, request):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            sent = await request.json()
            self.requests.append((dict(request.headers), sent))
            key = sent["messages"][-1]["content"][1]["text"]
            self.asked[key] = self.asked.get(key, 0) + 1
            return await self.behave(self.asked[key], sent)
        finally:
            self.now -= 1


@contextlib.contextmanager
def serving(behave):
    fake, loop, started = Fake(behave), asyncio.new_event_loop(), threading.Event()

    async def start():
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", fake.handle)
        fake.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await fake.runner.setup()
        site = web.TCPSite(fake.runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        started.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(fake.runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def said(text, reason="stop"):
    return web.json_response({"choices": [{"message": {"content": text}, "finish_reason": reason}],
                              "usage": {"completion_tokens": len(text.split())}})


def ask(url, questions, **settings):
    server = Server(**{"url": url, "model": "tiny", "backoff_s": 0.01, "timeout_s": 5} | settings)
    client = Client(server)
    try:
        return {answer.key: answer for answer in client.stream(questions)}
    finally:
        client.close()


def questions(count):
    return [Question(f"k{i}", b"\xff\xd8image", f"text {i}") for i in range(count)]


async def well(times, sent):
    return said("About " + sent["messages"][-1]["content"][1]["text"])


def test_every_question_gets_its_own_answer():
    with serving(well) as server:
        got = ask(server.url, questions(20), concurrency=4)
    assert got["k7"] == Answer("k7", "About text 7", "stop", 3)
    assert len(got) == 20
    image = server.requests[0][1]["messages"][0]["content"][0]["image_url"]["url"]
    assert image == "data:image/jpeg;base64,/9hpbWFnZQ=="


def test_the_bound_of_requests_in_flight_is_kept_and_reached_and_questions_are_made_no_faster_than_answered():
    made = []

    def slowly_made():
        for question in questions(60):
            made.append(time.monotonic())
            yield question

    async def slow(times, sent):
        await asyncio.sleep(0.05)
        ahead.append(len(made))
        return said("Well.")

    ahead = []
    with serving(slow) as server:
        ask(server.url, slowly_made(), concurrency=8)
    assert server.most == 8
    assert ahead[0] <= 9       # one waits for its turn


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    async def busy(times, sent):
        return said("At last.") if times > 2 else web.Response(status=status, headers={"Retry-After": "0"})
    with serving(busy) as server:
        got = ask(server.url, questions(3))
    assert {answer.text for answer in got.values()} == {"At last."}
    assert set(server.asked.values()) == {3}


def test_retry_after_is_respected():
    async def wait(times, sent):
        return said("Now.") if times > 1 else web.Response(status=429, headers={"Retry-After": "1"})
    with serving(wait) as server:
        started = time.monotonic()
        ask(server.url, questions(1))
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("text", [b"<html>oops</html>", b"{}", b'{"choices": []}', b"[1]", b"null", b"\xff\xfe",
                                  b'{"choices": [{"message": {"content": null}}]}',
                                  b'{"choices": [{"message": {"content": "  \\n"}}]}'])
def test_nonsense_is_an_error_of_the_row_and_not_a_caption(text):
    assert read("k", text).error == "bad_answer"

    async def nonsense(times, sent):
        return web.Response(body=text, content_type="application/json")
    with serving(nonsense) as server:
        got = ask(server.url, questions(2), retries=1)
    assert [answer.error for answer in got.values()] == ["bad_answer"] * 2
    assert set(server.asked.values()) == {2}


def test_a_request_that_the_server_refuses_is_not_repeated_and_stops_no_other():
    async def picky(times, sent):
        if sent["messages"][-1]["content"][1]["text"] == "text 1":
            return web.Response(status=400, text="image too large")
        return said("Fine.")
    with serving(picky) as server:
        got = ask(server.url, questions(3))
    assert got["k1"].error == "refused" and "image too large" in got["k1"].message
    assert got["k0"].text == got["k2"].text == "Fine."
    assert server.asked["text 1"] == 1


def test_a_slow_answer_times_out_and_the_others_go_on():
    async def stuck(times, sent):
        if sent["messages"][-1]["content"][1]["text"] == "text 0":
            await asyncio.sleep(5)
        return said("Quick.")
    with serving(stuck) as server:
        got = ask(server.url, questions(4), timeout_s=0.3, retries=1)
    assert got["k0"].error == "timeout"
    assert all(got[f"k{i}"].text == "Quick." for i in (1, 2, 3))


@pytest.mark.parametrize(("status", "words"), [(401, "api_key_env"), (404, "no such model")])
def test_a_wrong_key_or_model_stops_the_job_with_the_remedy(status, words):
    async def no(times, sent):
        return web.Response(status=status, text="no such model")
    with serving(no) as server, pytest.raises(ServerFailed, match=words):
        ask(server.url, questions(3))


def test_a_server_that_is_down_ends_the_job_and_does_not_hang():
    started = time.monotonic()
    with pytest.raises(ServerFailed, match="Is the server up"):
        ask("http://127.0.0.1:9/v1", questions(5), patience_s=0.5, retries=100, backoff_s=0.1)
    assert time.monotonic() - started < 20


def test_the_key_is_sent_and_sampling_is_stated(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    question = Question("k", b"x", "text", system="Be brief.", max_tokens=9, temperature=0.5, seed=4)
    with serving(well) as server:
        ask(server.url, [question], api_key_env="MY_KEY")
    headers, sent = server.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["max_tokens"], sent["temperature"], sent["seed"]) == (9, 0.5, 4)
    assert "secret" not in json.dumps(sent)
