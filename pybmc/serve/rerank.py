"""Scores of documents for a query: llama-server's routes,
which clients of Jina, Cohere and text-embeddings-inference use."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine.embed import encode_inputs
from ..engine.rerank import pair_ids
from .embed import list_of, passes, pooling_of
from .errors import Refused, invalid
from .fields import Fields
from .http import Json, fields_of, in_pool, service_of, while_here
from .service import Service
from .tasks import check_model

DOCUMENTS = 2048                        # of a request


async def rerank(request: Request) -> Response:
    service, fields = service_of(request), await fields_of(request)
    check_model(service, fields)
    if pooling_of(request) != "rank":
        raise Refused(400, "unsupported_model", f"{service.name} is no reranker: it gives no scores")
    query = fields.text("query")
    if query is None:
        raise fields.missing("query", "a text")
    name = "texts" if "texts" in fields and "documents" not in fields else "documents"
    texts = documents_of(fields, name)
    most = fields.whole("top_n", len(texts), 1)
    ids = await in_pool(request, encoded, service, query, texts)
    scores = [float(found[0]) for found in await while_here(request, passes(service, ids))]
    order = sorted(range(len(texts)), key=lambda i: -scores[i])[:most]
    if name == "texts":                 # text-embeddings-inference's form
        told = fields.flag("return_text")
        return Json([{"index": i, "score": scores[i]} | ({"text": texts[i]} if told else {}) for i in order])
    told = fields.flag("return_documents")
    results = [{"index": i, "relevance_score": scores[i]} | ({"document": {"text": texts[i]}} if told else {})
               for i in order]
    return Json(list_of(service, sum(map(len, ids)), results=results))


def documents_of(fields: Fields, name: str) -> list[str]:
    """Texts, or objects with a text."""
    given = fields.listed(name, DOCUMENTS)
    found = [document.get("text") if isinstance(document, dict) else document for document in given]
    texts = [text for text in found if isinstance(text, str)]
    if not texts or len(texts) < len(found):
        raise invalid(name,
                      f"expected {name} to be a list of texts, or of objects with a text, and not empty")
    return texts


def encoded(service: Service, query: str, texts: list[str]) -> list[list[int]]:
    pairs = [pair_ids(service.tokenizer, query, text) for text in texts]
    return encode_inputs(service.model, pairs, service.context)


ROUTES = [Route(prefix + path, rerank, methods=["POST"])
          for prefix in ("/v1", "") for path in ("/rerank", "/reranking")]
