"""Views, and where they are."""

import asyncio

from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

from pglimits.django import concurrency, limiter, middleware, rate_limit

whole_site = middleware(rate_limit("site", key=lambda request: request.headers.get("site-key")))


def tenant(request: HttpRequest) -> str:
    return request.headers.get("tenant", "")


async def later(request: HttpRequest) -> str:
    await asyncio.sleep(0)
    return tenant(request)


def seen() -> list:
    return [(holder.name, holder.key, holder.holder) for holder in limiter().holders()]


@rate_limit("api", key=tenant)
def api(request: HttpRequest) -> HttpResponse:
    return HttpResponse("done")


@transaction.non_atomic_requests(using="limits")  # Django has no such transactions for async views
@rate_limit("api", key=later)
async def async_api(request: HttpRequest) -> HttpResponse:
    return HttpResponse("done")


@method_decorator(rate_limit("api", key=tenant), name="dispatch")
class OfClass(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("done")


@method_decorator(rate_limit("api", key=later), name="dispatch")
class AsyncOfClass(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("done")


@concurrency("reports")
def report(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"atomic": connections["limits"].in_atomic_block, "held": seen()})


@concurrency("reports")
def failing(request: HttpRequest) -> HttpResponse:
    raise ValueError("of the view")


@concurrency("reports")
def stream(request: HttpRequest) -> HttpResponse:
    return StreamingHttpResponse(str(len(seen())) for _ in range(3))


async def async_stream(request: HttpRequest) -> HttpResponse:
    async def chunks():
        for _ in range(3):
            yield str(len(await asyncio.to_thread(seen)))

    return StreamingHttpResponse(chunks())


@transaction.non_atomic_requests(using="limits")
@concurrency("reports", timeout_seconds=60)
async def endless(request: HttpRequest) -> HttpResponse:
    async def chunks():
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    return StreamingHttpResponse(chunks())


views = {"endless": endless, "api": api, "async-api": async_api, "report": report, "failing": failing, "stream": stream}
views |= {"of-class": OfClass.as_view()}
views |= {"async-of-class": transaction.non_atomic_requests(using="limits")(AsyncOfClass.as_view())}
urlpatterns = [path(name, view) for name, view in views.items()]
for name, seconds in (("async-stream", 0), ("waiting", 60)):
    limited = concurrency("reports", timeout_seconds=seconds)(async_stream)
    urlpatterns.append(path(name, transaction.non_atomic_requests(using="limits")(limited)))
