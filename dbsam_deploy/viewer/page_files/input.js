// Mouse, pen, finger and keys → what the app does.

const $ = (id) => document.getElementById(id);
const KEYS = { v: "move", b: "box", p: "include", x: "exclude" };

/** Draw with the chosen tool on a tile; turn the 3D view; the wheel goes through the slices. */
export function listenToPointer(app, stage, overlay) {
  let start = null;
  const at = (event) => {
    const edge = overlay.getBoundingClientRect();
    return [event.clientX - edge.left, event.clientY - edge.top];
  };
  overlay.addEventListener("pointerdown", (event) => {
    if (!app.study || event.button !== 0 || start) return;
    const [x, y] = at(event);
    const tile = app.scene.tileAt(x, y);
    if (!tile) return;
    overlay.setPointerCapture(event.pointerId);
    start = { x, y, tile, id: event.pointerId, from: tile === "render" ? null : app.scene.placeAt(x, y, tile) };
  });
  overlay.addEventListener("pointermove", (event) => {
    if (!start || event.pointerId !== start.id) return;
    const [x, y] = at(event);
    if (start.tile === "render") {
      app.scene.turn(x - start.x, y - start.y);
      [start.x, start.y] = [x, y];
    } else if (app.tool === "box") {
      const across = app.scene.across(start.tile.plane);
      app.scene.draft = { box: boxOf(start.from, app.scene.placeAt(x, y, start.tile), across), across };
      app.scene.drawMarks();
    }
  });
  overlay.addEventListener("pointerup", (event) => {
    if (!start || event.pointerId !== start.id) return;
    const { tile, from, x: startX, y: startY } = start;
    start = null;
    if (tile === "render") return;
    const [x, y] = at(event);
    const across = app.scene.across(tile.plane);
    if (app.tool !== "box") {
      app.drawPoint(from.map(Math.floor), app.tool === "include");
    } else if (Math.hypot(x - startX, y - startY) > 4) {
      app.drawBox(boxOf(from, app.scene.placeAt(x, y, tile), across), across);
    } else {
      app.scene.draft = null;
      app.scene.drawMarks();
      app.note("drag to draw a box");
    }
  });
  overlay.addEventListener("pointercancel", () => {
    start = null;
    app.scene.draft = null;
    app.scene.drawMarks();
  });
  stage.addEventListener("wheel", (event) => {
    if (!app.study || event.target.closest("dialog, #message")) return;
    event.preventDefault();
    const edge = overlay.getBoundingClientRect();
    const tile = app.scene.tileAt(event.clientX - edge.left, event.clientY - edge.top);
    const direction = event.deltaY < 0 ? 1 : -1;
    if (event.ctrlKey || tile === "render") app.scene.zoom(direction);
    else app.scene.step(direction, tile ? app.scene.across(tile.plane) : undefined);
  }, { capture: true, passive: false });
}

/** Two places on a slice → [[z0, z1], [y0, y1], [x0, x1]], half-open, in whole voxels. */
export function boxOf(from, to, across) {
  return from.map((one, array) => {
    if (array === across) return [Math.floor(one), Math.floor(one) + 1];
    const low = Math.round(Math.min(one, to[array]));
    return [low, Math.max(Math.round(Math.max(one, to[array])), low + 1)];
  });
}

export function listenToKeys(app) {
  // A list that was chosen from lets the keys go again.
  addEventListener("change", (event) => event.target.matches("select") && event.target.blur());
  addEventListener("keydown", (event) => {
    const isText = event.target.closest?.("input[type=text], input[type=password], select, textarea");
    if (isText || document.querySelector("dialog[open]") || event.altKey) return;
    if (event.key === "Enter" && event.target.closest?.("button, a, summary")) return;
    if (event.target.closest?.("input[type=range]") && event.key.startsWith("Arrow")) return;
    if (act(app, event)) {
      event.preventDefault();
      event.stopImmediatePropagation();
    }
  }, { capture: true });
}

/** Do what a key says; whether it says anything. */
function act(app, event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const isControl = event.ctrlKey || event.metaKey;
  if (key === "?" || key === "h" && !isControl) return done(() => $("help").showModal());
  if (key === "o" && !isControl) return done(() => { $("welcome").hidden = false; $("open-file").focus(); });
  if (key === "Escape" && app.study) return done(() => { $("welcome").hidden = true; app.say(""); app.corner = null; app.showMarks(); });
  if (!app.study) return false;
  if (key === "u" && !isControl || key === "z" && isControl) return done(() => app.undo());
  if (isControl) return false;
  if (KEYS[key]) return done(() => { app.setTool(KEYS[key]); $("canvas").focus(); });
  if (/^[1-9]$/.test(key)) return done(() => app.choose(Number(key) - 1));
  const arrow = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[key];
  if (arrow && event.shiftKey) return done(() => { app.scene.nudge(...arrow); showCorner(app); });
  const actions = {
    n: () => app.addLabel(),
    t: () => { $("through").checked = !$("through").checked; },
    m: () => app.hideMasks(),
    s: () => app.save(),
    w: () => app.setView(app.scene.views[(app.scene.views.indexOf(app.scene.view) + 1) % app.scene.views.length]),
    "+": () => app.scene.zoom(1),
    "=": () => app.scene.zoom(1),
    "-": () => app.scene.zoom(-1),
    0: () => app.scene.zoom(0),
    ArrowUp: () => app.scene.step(1),
    ArrowDown: () => app.scene.step(-1),
    PageUp: () => app.scene.step(10),
    PageDown: () => app.scene.step(-10),
    Enter: () => atCrosshair(app),
  };
  return actions[key] ? done(actions[key]) : false;
}

function done(action) {
  action();
  return true;
}

/** A point at the crosshair, or one of a box's corners. */
function atCrosshair(app) {
  const place = app.scene.place;
  if (app.tool === "include" || app.tool === "exclude") {
    app.drawPoint(place, app.tool === "include");
  } else if (app.tool === "box") {
    if (app.corner) {
      const box = between(app.corner, place, app.scene.across());
      app.corner = null;
      app.drawBox(box, app.scene.across());
    } else {
      app.corner = place;
      app.note("first corner: move with Shift and arrows, Enter for the other one");
      showCorner(app);
    }
  }
}

function showCorner(app) {
  if (!app.corner) return;
  const across = app.scene.across();
  app.scene.draft = { box: between(app.corner, app.scene.place, across), across };
  app.scene.drawMarks();
}

/** The box that holds two voxels of a slice. */
function between(one, other, across) {
  return one.map((at, array) =>
    array === across ? [other[array], other[array] + 1] : [Math.min(at, other[array]), Math.max(at, other[array]) + 1]);
}
