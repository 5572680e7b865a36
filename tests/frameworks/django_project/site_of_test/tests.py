"""The tests of the project, in the database that Django makes for them."""

import asyncio
import gc
import io

from django.core.management import call_command
from django.db import connections
from django.http import HttpResponse
from django.test import TestCase, TransactionTestCase

from pglimits.django import async_limiter, limiter


class Limits(TestCase):
    databases = ("limits",)

    def setUp(self):
        for name, limit, rate in (("api", 2, 0.01), ("reports", 1, 0), ("site", 3, 0.01)):
            limiter().upsert(name, limit, slot_decay_per_second=rate)
            limiter().reset(name)

    def refused(self, response: HttpResponse, name: str) -> None:
        self.assertEqual((response.status_code, response["Content-Type"]), (429, "application/problem+json"))
        self.assertEqual(response.json()["violated-policies"], [name])

    def test_a_view_beyond_the_rate_is_refused(self):
        first, second, third = (self.client.get("/api", headers={"tenant": "a"}) for _ in range(3))
        self.assertEqual((first.status_code, second.status_code), (200, 200))
        self.assertEqual(first["RateLimit-Policy"], '"api";q=2;w=200;pk=:YQ==:')
        self.refused(third, "api")
        self.assertGreater(int(third["Retry-After"]), 80)
        self.assertEqual(self.client.get("/api", headers={"tenant": "b"}).status_code, 200)

    async def test_an_async_view_is_limited_by_an_async_key(self):
        answers = [await self.async_client.get("/async-api", headers={"tenant": "a"}) for _ in range(3)]
        self.assertEqual([each.status_code for each in answers], [200, 200, 429])
        self.refused(answers[2], "api")

    async def test_views_of_classes_are_limited_where_they_dispatch(self):
        for path in ("/of-class", "/async-of-class"):
            answers = [await self.async_client.get(path, headers={"tenant": path}) for _ in range(3)]
            self.assertEqual([each.status_code for each in answers], [200, 200, 429])

    def test_the_middleware_limits_every_view_and_adds_its_fields(self):
        answers = [self.client.get("/api", headers={"site-key": "s"}) for _ in range(2)]
        self.assertEqual([each.status_code for each in answers], [200, 200])
        self.assertEqual(answers[1]["RateLimit"].split('"site"')[1][:4], ";r=1")
        self.assertIn('"api";r=0', answers[1]["RateLimit"])
        self.refused(self.client.get("/api", headers={"site-key": "s"}), "api")
        self.refused(self.client.get("/report", headers={"site-key": "s"}), "site")

    def test_a_slot_is_held_by_a_view_in_its_transaction_and_free_afterwards(self):
        for _ in range(2):
            answer = self.client.get("/report").json()
            self.assertEqual(answer["atomic"], True)
            self.assertEqual(answer["held"], [["reports", "", {"method": "GET", "path": "/report"}]])
        self.assertEqual(limiter().holders(), [])

    def test_what_a_rolled_back_view_used_stays_used_and_its_slot_is_free(self):
        for _ in range(2):
            with self.assertRaisesMessage(ValueError, "of the view"):
                self.client.get("/failing", headers={"site-key": "s"})
        self.assertEqual(limiter().holders(), [])
        self.assertEqual(round(limiter().get("site").level), 2)

    def test_a_stream_holds_its_slot_until_it_ends(self):
        answer = self.client.get("/stream")
        self.refused(self.client.get("/report"), "reports")
        self.assertEqual(answer.getvalue(), b"111")
        self.assertEqual(limiter().holders(), [])

    async def test_an_async_stream_as_well(self):
        answer = await self.async_client.get("/async-stream")
        self.assertEqual([chunk async for chunk in answer.streaming_content], [b"1", b"1", b"1"])
        async with asyncio.timeout(20):  # Django's test client closes it in the event loop, which waits for nothing
            while await async_limiter().holders():
                await asyncio.sleep(0.01)

    def test_a_response_that_is_forgotten_gives_its_slot_back(self):
        held = self.client.get("/stream")
        self.assertEqual(len(limiter().holders()), 1)
        held.context = held.request = held.client = None
        del held
        gc.collect()  # which waits for nothing
        limiter().release(limiter().acquire("reports", timeout_seconds=20))

    async def test_a_cancelled_request_leaves_the_line(self):
        async with asyncio.timeout(20), async_limiter().concurrency("reports"):
            asking = asyncio.create_task(self.async_client.get("/waiting"))
            while not await async_limiter().waiters():
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            while await async_limiter().waiters():
                await asyncio.sleep(0.01)


class Migrations(TransactionTestCase):
    databases = ("limits",)

    def test_migrate_removes_installs_and_upgrades(self):
        def there() -> object:
            with connections["limits"].cursor() as cursor:
                cursor.execute("select to_regprocedure('pglimits.version()')::text")
                return cursor.fetchone()[0]

        def migrate(*target: str) -> None:
            call_command("migrate", "pglimits", *target, database="limits", stdout=io.StringIO())

        self.assertEqual(there(), "pglimits.version()")
        migrate("zero")
        self.assertIsNone(there())
        with self.settings(MIGRATION_MODULES={"pglimits": None}):  # as a test run without migrations has it
            call_command("migrate", run_syncdb=True, database="limits", stdout=io.StringIO())
        self.assertEqual(there(), "pglimits.version()")
        migrate()
        with connections["limits"].cursor() as cursor:
            cursor.execute("drop schema pglimits cascade")
        migrate()  # recorded, and not there: by another alias of the same database, or with a router that forbids it
        self.assertEqual(there(), "pglimits.version()")
        with connections["limits"].cursor() as cursor:
            cursor.execute(
                "create or replace function pglimits.version() returns text language sql as $$ select '0.0.1' $$"
            )
        migrate()
        with connections["limits"].cursor() as cursor:
            cursor.execute("select pglimits.version()")
            self.assertNotEqual(cursor.fetchone()[0], "0.0.1")
