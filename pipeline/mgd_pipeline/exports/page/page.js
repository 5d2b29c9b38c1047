import { Network } from "./network.js";
import { pixelsOf, readPhoto } from "./photos.js";
import { pngOfMask } from "./png.js";
import { Problem } from "./problem.js";

const LARGEST_SHOWN = 2048; // pixels of the longer side on the screen; the network sees all

const $ = (id) => document.getElementById(id);
const canvases = { photo: $("photo"), mask: $("mask") };
const video = document.createElement("video");
video.muted = true;
video.playsInline = true;

let student; // student.json, before the network
let palette; // 256 colours
let shown = null; // { name, ids, width, height, shares } of the picture on the screen
let alone = null; // the class that is shown alone
let stream = null; // of the camera
let facing = "environment";
let latest = 0; // number of the latest picture that a person has asked for

async function start() {
  student = await (await fetched("student.json")).json();
  palette = Array.from({ length: 256 }, (_, id) => student.palette[id] ?? student.void);
  const size = `${(student.bytes / 1e6).toFixed(1)} MB`;
  $("about").textContent = `${student.network}, ${student.classes.length} classes, ${size}. Photos stay on this device.`;
  list();
  say("Loading the network …");
  const opened = await Network.open(await testPicture());
  $("runtime").textContent = opened.runtime;
  say("Ready.");
  navigator.serviceWorker?.register("offline.js").catch(() => {}); // a browser that keeps nothing still shows the page
  return opened;
}

async function fetched(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Problem(`${name} is missing on the server: copy the whole folder there.`);
  return response;
}

/** A picture and the student's own mask of it, for checking this browser. It is read like any photo. */
async function testPicture() {
  const [picture, mask] = await Promise.all([fetched("check.png"), fetched("check.mask")]);
  return { ...(await readPhoto(await picture.blob(), student.photos)), mask: new Uint8Array(await mask.arrayBuffer()) };
}

// --- photos

async function open(file) {
  stopCamera();
  const turn = ++latest;
  await working(async () => {
    const running = await network;
    const photo = await readPhoto(file, student.photos);
    if (turn !== latest) return;
    clear();
    await paint(photo);
    $("view").dataset.state = "picture";
    say(`Segmenting ${file.name || "the picture"}, ${photo.width} × ${photo.height} pixels …`);
    const { mask, milliseconds } = await running.run(photo);
    if (turn !== latest) return;
    show(photo, mask, file.name || "picture");
    $("time").textContent = `${Math.round(milliseconds)} ms`;
    $("runtime").textContent = running.runtime;
    say(`Done: ${summary()}.`);
  }, turn);
}

async function working(action, turn) {
  document.body.dataset.working = "";
  complain("");
  try {
    await action();
  } catch (error) {
    if (turn !== latest) return;
    say("");
    complain(error instanceof Problem ? error.message : `Something went wrong in the page: ${error.message}`);
    if (!(error instanceof Problem)) throw error;
  } finally {
    if (turn === latest) delete document.body.dataset.working;
  }
}

// --- the camera

async function startCamera() {
  stopCamera();
  const turn = ++latest;
  await working(async () => {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Problem("Browsers allow the camera only on https pages and on localhost. Open the page there, or choose a photo.");
    }
    say("Waiting for the camera …");
    const running = await network;
    const wanted = { facingMode: facing, width: { ideal: 640 }, height: { ideal: 480 } };
    const opened = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false }).catch((error) => {
      throw new Problem(cameraFault(error));
    });
    if (turn !== latest) return stopTracks(opened);
    stream = opened;
    video.srcObject = opened;
    await video.play();
    $("camera").textContent = "Stop the camera";
    const cameras = (await navigator.mediaDevices.enumerateDevices()).filter(({ kind }) => kind === "videoinput");
    $("turn").hidden = cameras.length < 2;
    $("turn").textContent = facing === "user" ? "Back camera" : "Front camera";
    say("The camera is running.");
    delete document.body.dataset.working;
    await watch(opened, running);
  }, turn);
}

/** Segments one frame after the other until the camera stops; the picture on the screen is always the one of its mask. */
async function watch(mine, running) {
  let before = performance.now();
  try {
    while (stream === mine) {
      const { videoWidth: width, videoHeight: height } = video;
      const frame = { pixels: pixelsOf(video, width, height, "The camera's picture"), width, height };
      const { mask, milliseconds } = await running.run(frame);
      if (stream !== mine) return;
      await paint(frame);
      show(frame, mask, "camera");
      const now = performance.now();
      $("time").replaceChildren(`${Math.round(milliseconds)} ms`, small(`${(1000 / (now - before)).toFixed(1)} frames a second`));
      $("runtime").textContent = running.runtime;
      before = now;
      await nextFrame();
    }
  } finally {
    if (stream === mine) stopCamera();
  }
}

/** When the page is drawn again; a hidden page waits. */
function nextFrame() {
  return new Promise((resolve) => requestAnimationFrame(resolve));
}

function stopCamera() {
  if (!stream) return;
  stopTracks(stream);
  stream = video.srcObject = null;
  $("camera").textContent = "Use the camera";
  $("turn").hidden = true;
  say(shown ? `The camera is off. Last frame: ${summary()}.` : "The camera is off.");
}

function stopTracks(of) {
  for (const track of of.getTracks()) track.stop();
}

function cameraFault({ name, message }) {
  if (name === "NotAllowedError") return "The browser was not allowed to use the camera. Allow it in the settings of this page, or choose a photo.";
  if (name === "NotFoundError" || name === "OverconstrainedError") return "There is no camera here. Choose a photo.";
  if (name === "NotReadableError") return "The camera does not answer. Another program may be using it.";
  return `The camera cannot be used (${message}). Choose a photo.`;
}

// --- the result

function clear() {
  shown = alone = null;
  $("save").disabled = true;
  list();
  $("time").textContent = "–";
  canvases.mask.width = canvases.mask.height = 1;
}

function show(photo, ids, name) {
  const counts = new Uint32Array(256);
  for (const id of ids) counts[id]++;
  const shares = Array.from(student.classes, (_, id) => counts[id] / ids.length);
  shown = { ...photo, ids, name, shares };
  $("view").dataset.state = "picture";
  paintMask();
  list();
  canvases.mask.setAttribute("aria-label", `${name}, segmented: ${summary()}`);
  $("save").disabled = false;
}

/** Draws a photo no larger than a screen needs it. */
async function paint({ pixels, width, height }) {
  const [wide, tall] = sizeShown(width, height);
  const picture = new ImageData(pixels, width, height);
  const bitmap = wide < width || tall < height ? await createImageBitmap(picture) : null;
  const context = resized(canvases.photo, wide, tall);
  context.canvas.parentElement.style.setProperty("--ratio", wide / tall);
  if (bitmap) context.drawImage(bitmap, 0, 0, wide, tall);
  else context.putImageData(picture, 0, 0);
  bitmap?.close();
}

function resized(canvas, wide, tall) {
  if (canvas.width !== wide || canvas.height !== tall) [canvas.width, canvas.height] = [wide, tall];
  return canvas.getContext("2d");
}

function paintMask() {
  const { ids, width, height } = shown;
  const [wide, tall] = sizeShown(width, height);
  const colours = new Uint8ClampedArray(1024);
  palette.forEach((colour, id) => colours.set([...colour, alone === null || alone === id ? 255 : 0], 4 * id));
  const table = new Uint32Array(colours.buffer), lines = new Uint32Array(wide * tall);
  for (let y = 0, at = 0; y < tall; y++) {
    const row = Math.floor(((y + 0.5) * height) / tall) * width;
    for (let x = 0; x < wide; x++, at++) lines[at] = table[ids[row + Math.floor(((x + 0.5) * width) / wide)]];
  }
  resized(canvases.mask, wide, tall).putImageData(new ImageData(new Uint8ClampedArray(lines.buffer), wide, tall), 0, 0);
}

function sizeShown(width, height) {
  const scale = Math.min(1, LARGEST_SHOWN / Math.max(width, height));
  return [width, height].map((side) => Math.max(1, Math.round(side * scale)));
}

/** The legend: before a picture all classes, then the classes that occur, the largest first. */
function list() {
  const shares = shown?.shares ?? student.classes.map(() => 0);
  const ids = student.classes.map((_, id) => id).filter((id) => !shown || shares[id] > 0);
  ids.sort((one, other) => shares[other] - shares[one]);
  if (shown && alone !== null && !shares[alone]) {
    alone = null;
    paintMask();
  }
  const legend = $("legend");
  const before = Array.from(legend.children, (item) => Number(item.dataset.id));
  // While a camera sees the same classes, entries stay where they are, so that a person can press them.
  const order = stream && before.length === ids.length && before.every((id) => ids.includes(id)) ? before : ids;
  if (order.join() !== before.join()) legend.replaceChildren(...order.map(entry)); // which takes the focus away
  for (const item of legend.children) {
    const id = Number(item.dataset.id), button = item.firstElementChild;
    button.disabled = !shown;
    button.setAttribute("aria-pressed", String(alone === id));
    item.querySelector(".share").textContent = shown ? percent(shares[id]) : "";
    item.querySelector("i").style.width = `${100 * shares[id]}%`;
  }
  $("hint").hidden = !shown;
  const absent = shown ? student.classes.filter((_, id) => !shares[id]) : [];
  $("absent").textContent = absent.length ? `Not in this picture: ${absent.join(", ")}.` : "";
}

function entry(id) {
  const item = document.createElement("li"), button = document.createElement("button");
  item.dataset.id = id;
  button.type = "button";
  const parts = ["swatch", "name", "share", "bar"].map((name) => {
    const part = document.createElement("span");
    part.className = name;
    return part;
  });
  parts[0].style.background = `rgb(${palette[id].join(" ")})`;
  parts[1].textContent = student.classes[id];
  parts[3].append(document.createElement("i"));
  button.append(...parts);
  button.addEventListener("click", () => {
    alone = alone === id ? null : id;
    paintMask();
    list();
  });
  item.append(button);
  return item;
}

function percent(share) {
  const number = 100 * share;
  return number > 0 && number < 0.1 ? "< 0.1 %" : `${number.toFixed(1)} %`;
}

/** The three largest classes, for people who do not see the picture. */
function summary() {
  const present = shown.shares.map((share, id) => [share, student.classes[id]]).filter(([share]) => share > 0);
  present.sort(([one], [other]) => other - one);
  const largest = present.slice(0, 3).map(([share, name]) => `${name} ${percent(share)}`);
  return largest.join(", ") + (present.length > 3 ? ` and ${present.length - 3} more` : "");
}

async function save() {
  const { ids, width, height, name } = shown;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await pngOfMask(ids, width, height, palette));
  link.download = `${name.replace(/\.[^.]*$/, "")}-mask.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// --- what the page says

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("problem").textContent = text;
}

function small(text) {
  const element = document.createElement("small");
  element.textContent = text;
  return element;
}

// --- what a person does

$("choose").addEventListener("click", () => $("file").click());
$("view").addEventListener("click", ({ currentTarget }) => currentTarget.dataset.state === "empty" && $("file").click());
$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) open(target.files[0]);
  target.value = ""; // the same file may be chosen again
});
$("camera").addEventListener("click", () => (stream ? stopCamera() : startCamera()));
$("turn").addEventListener("click", () => {
  facing = facing === "user" ? "environment" : "user";
  startCamera();
});
$("save").addEventListener("click", save);
$("opacity").addEventListener("input", ({ target }) => {
  canvases.mask.style.opacity = target.value / 100;
  $("percent").textContent = `${target.value} %`;
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("view").classList.add("over");
  });
}
document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget ?? $("view").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("view").classList.remove("over");
  offered(event.dataTransfer.files, "What was dropped");
});
document.addEventListener("paste", ({ clipboardData }) => offered(clipboardData.files, "What was pasted"));

function offered(files, what) {
  if (files.length) open(files[0]);
  else complain(`${what} is not a file. Choose a photo instead.`);
}

const network = start();
network.catch((error) => {
  say("");
  complain(error instanceof Problem ? error.message : `The page could not start: ${error.message}`);
  if (!(error instanceof Problem)) throw error;
});
