// Keeps the page for times without a network. The server comes first, so nobody sees an old student while there is a newer one.

const VERSION = "@VERSION@";
const FILES = ["@FILES@"];
const OURS = `mgd-pipeline ${self.registration.scope} `;

self.addEventListener("install", (event) => event.waitUntil(keep()));
self.addEventListener("activate", (event) => event.waitUntil(removeFormer()));
self.addEventListener("fetch", (event) => event.respondWith(fetch(event.request).catch(() => kept(event.request))));

async function keep() {
  const cache = await caches.open(OURS + VERSION);
  await cache.addAll(FILES.map((name) => new Request(name, { cache: "no-cache" })));
  await self.skipWaiting();
}

async function removeFormer() {
  const former = (await caches.keys()).filter((name) => name.startsWith(OURS) && name !== OURS + VERSION);
  await Promise.all(former.map((name) => caches.delete(name)));
  await self.clients.claim();
}

async function kept(request) {
  const cache = await caches.open(OURS + VERSION);
  return (await cache.match(request, { ignoreSearch: true })) ?? Response.error();
}
