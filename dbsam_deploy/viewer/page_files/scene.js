// The image and its masks on the screen. Places are those of the server's array: [z, y, x].
//
// NiiVue turns a volume so that its axes run right, anterior, superior ("RAS"); masks are kept in that
// order, a byte a voxel: bit n - 1 is label n. Which colour a byte has, a table of 256 says.

import { NVImage, Niivue } from "./third_party/niivue.js";

const PLANES = ["axial", "coronal", "sagittal"];
const NORMAL = [2, 1, 0]; // RAS axis across each of PLANES
const ACROSS = [[0, 1], [0, 2], [1, 2]]; // RAS axes to the right and up in each
const RENDER = 4;
const MULTI = 3;

export class Scene {
  constructor(canvas, overlay) {
    this.canvas = canvas;
    this.overlay = overlay;
    this.marks = [];
    this.draft = null;
    this.colours = [];
    this.onSlice = () => {};
    // Our keys, wheel and files, not NiiVue's: these listeners are called first.
    for (const kind of ["keydown", "keyup", "wheel", "drop", "dragenter", "dragover", "dblclick"]) {
      canvas.addEventListener(kind, (event) => event.stopImmediatePropagation(), { capture: true, passive: false });
    }
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.94, 0.89, 0.26, 0.55],
      crosshairWidthUnit: "percent",
      dragAndDropEnabled: false,
      isNearestInterpolation: true,
      isRadiologicalConvention: true,
      logLevel: "error",
      loadingText: "",
      show3Dcrosshair: false,
      multiplanarForceRender: true,
    });
  }

  async start() {
    await this.nv.attachToCanvas(this.canvas, false);
    const draw = this.nv.drawScene.bind(this.nv);
    this.nv.drawScene = (...more) => {
      const result = draw(...more);
      this.drawMarks();
      return result;
    };
  }

  /** Show another image, an ArrayBuffer of a NIfTI file, without masks. */
  async open(buffer) {
    const nv = this.nv;
    this.shape = null;
    this.marks = [];
    nv.closeDrawing();
    while (nv.volumes.length) nv.removeVolume(nv.volumes[0]);
    const image = await NVImage.new(buffer, "image.nii");
    image.cal_min = 0;
    image.cal_max = 255;
    nv.addVolume(image);
    nv.createEmptyDrawing();
    this.bits = nv.drawBitmap;
    this.counts = new Array(8).fill(0); // voxels of each label
    this.sides = image.dimsRAS.slice(1, 4);
    this.axes = image.permRAS.map((axis) => ({ array: 3 - Math.abs(axis), isFlipped: axis < 0 }));
    const strides = [1, this.sides[0], this.sides[0] * this.sides[1]];
    this.first = 0;
    this.steps = [0, 0, 0];
    this.axes.forEach(({ array, isFlipped }, axis) => {
      this.steps[array] = isFlipped ? -strides[axis] : strides[axis];
      if (isFlipped) this.first += (this.sides[axis] - 1) * strides[axis];
    });
    this.shape = [0, 1, 2].map((array) => this.sides[this.axisOf(array)]);
    this.setView(this.isVolume ? this.acquired : "axial");
    this.zoom(0);
    nv.scene.crosshairPos = [0, 1, 2].map((a) => (Math.floor(this.sides[a] / 2) + 0.5) / this.sides[a]);
    nv.opts.crosshairWidth = this.isVolume ? 0.2 : 0;
    nv.opts.isOrientationTextVisible = this.isVolume;
    this.recolour();
    nv.drawScene();
  }

  get isVolume() {
    return this.shape?.[0] > 1;
  }

  /** Name of the plane whose slices the file holds. */
  get acquired() {
    return PLANES[NORMAL.indexOf(this.axisOf(0))];
  }

  axisOf(array) {
    return this.axes.findIndex((one) => one.array === array);
  }

  // masks

  /** Write one label's voxels of a box [[z0, z1], [y0, y1], [x0, x1]]. */
  write(box, voxels, label) {
    const [[z0, z1], [y0, y1], [x0, x1]] = box;
    const [sz, sy, sx] = this.steps;
    const bit = 1 << (label - 1);
    const bits = this.bits;
    let n = 0;
    let more = 0;
    for (let z = z0; z < z1; z++) {
      for (let y = y0; y < y1; y++) {
        let at = this.first + z * sz + y * sy + x0 * sx;
        for (let x = x0; x < x1; x++, at += sx) {
          const before = bits[at];
          bits[at] = voxels[n++] ? before | bit : before & ~bit;
          if (bits[at] !== before) more += bits[at] > before ? 1 : -1;
        }
      }
    }
    this.counts[label - 1] += more;
    this.upload(box);
  }

  /** Bring a box of the masks to the graphics card; all of a large volume would take a second. */
  upload(box) {
    const { gl, opts, drawTexture } = this.nv;
    if (opts.is2DSliceShader) return this.nv.refreshDrawing(true);
    const [[x0, x1], [y0, y1], [z0, z1]] = this.axes.map(({ array, isFlipped }, axis) => {
      const [first, end] = box[array];
      return isFlipped ? [this.sides[axis] - end, this.sides[axis] - first] : [first, end];
    });
    const [width, height] = this.sides;
    const part = new Uint8Array((x1 - x0) * (y1 - y0) * (z1 - z0));
    let n = 0;
    for (let z = z0; z < z1; z++) {
      for (let y = y0; y < y1; y++, n += x1 - x0) {
        const row = (z * height + y) * width;
        part.set(this.bits.subarray(row + x0, row + x1), n);
      }
    }
    gl.activeTexture(gl.TEXTURE7); // NiiVue's unit for drawings
    gl.bindTexture(gl.TEXTURE_3D, drawTexture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, x0, y0, z0, x1 - x0, y1 - y0, z1 - z0, gl.RED, gl.UNSIGNED_BYTE, part);
    return this.nv.drawScene();
  }

  /** The bytes of all labels in the order of the server's array. */
  masks() {
    const [depth, height, width] = this.shape;
    const [sz, sy, sx] = this.steps;
    const out = new Uint8Array(this.bits.length);
    let n = 0;
    for (let z = 0; z < depth; z++) {
      for (let y = 0; y < height; y++) {
        let at = this.first + z * sz + y * sy;
        for (let x = 0; x < width; x++, at += sx) out[n++] = this.bits[at];
      }
    }
    return out;
  }

  /** Take masks in the order of the server's array. */
  takeMasks(masks) {
    const [depth, height, width] = this.shape;
    const [sz, sy, sx] = this.steps;
    let n = 0;
    for (let z = 0; z < depth; z++) {
      for (let y = 0; y < height; y++) {
        let at = this.first + z * sz + y * sy;
        for (let x = 0; x < width; x++, at += sx) this.bits[at] = masks[n++];
      }
    }
    const seen = new Uint32Array(256);
    for (let at = 0; at < masks.length; at++) seen[masks[at]]++;
    this.counts = this.counts.map((_, index) => seen.reduce((sum, count, byte) => sum + (byte >> index & 1) * count, 0));
    this.nv.refreshDrawing(true);
  }

  /** Forget one label. */
  erase(label) {
    const keep = ~(1 << (label - 1));
    for (let at = 0; at < this.bits.length; at++) this.bits[at] &= keep;
    this.counts[label - 1] = 0;
    this.nv.refreshDrawing(true);
  }

  /** Colours [r, g, b] by label, from 1; null for one that is not shown. The later label is on top. */
  setColours(colours) {
    this.colours = colours;
    this.recolour();
    this.nv.drawScene();
  }

  recolour() {
    const lut = new Uint8ClampedArray(1024);
    for (let byte = 1; byte < 256; byte++) {
      for (let index = this.colours.length - 1; index >= 0; index--) {
        if (byte >> index & 1 && this.colours[index]) {
          lut.set([...this.colours[index], 255], 4 * byte);
          break;
        }
      }
    }
    this.nv.drawLut = { lut, labels: Array.from({ length: 256 }, () => "") };
    if (this.nv.volumes.length) this.nv.refreshColormaps();
  }

  setOpacity(part) {
    this.nv.drawOpacity = part;
    this.nv.drawScene();
  }

  // views and slices

  get views() {
    return this.isVolume ? [...PLANES, "four", "3D"] : ["axial"];
  }

  setView(name) {
    // In 3D the body is a veil, through which the masks are seen.
    if ((name === "3D") !== (this.view === "3D") && this.isVolume) this.nv.setOpacity(0, name === "3D" ? 0.25 : 1);
    this.view = name;
    const index = PLANES.indexOf(name);
    this.nv.setSliceType(index >= 0 ? index : name === "four" ? MULTI : RENDER);
    this.onSlice();
  }

  /** The array's axis that the slices of a plane are across; by default of the plane that is seen. */
  across(plane = PLANES.indexOf(this.view)) {
    return plane >= 0 && plane < 3 ? this.axes[NORMAL[plane]].array : 0;
  }

  /** The voxel under the crosshair. */
  get place() {
    const out = [0, 0, 0];
    this.axes.forEach(({ array, isFlipped }, axis) => {
      const side = this.sides[axis];
      const at = Math.min(Math.max(Math.floor(this.nv.scene.crosshairPos[axis] * side), 0), side - 1);
      out[array] = isFlipped ? side - 1 - at : at;
    });
    return out;
  }

  set place(voxel) {
    const at = [...this.nv.scene.crosshairPos];
    this.axes.forEach(({ array, isFlipped }, axis) => {
      const side = this.sides[axis];
      const one = Math.min(Math.max(voxel[array], 0), side - 1);
      at[axis] = ((isFlipped ? side - 1 - one : one) + 0.5) / side;
    });
    this.nv.scene.crosshairPos = at;
    this.nv.drawScene();
    this.onSlice();
  }

  /** Go to another slice; `array` is the axis across it. */
  step(count, array = this.across()) {
    const place = this.place;
    // Upwards on the screen is towards the head, the nose or the left.
    place[array] += this.axes[this.axisOf(array)].isFlipped ? -count : count;
    this.place = place;
  }

  /** Move the crosshair on its slice, to the right and up as it is seen. */
  nudge(right, up) {
    const plane = Math.max(PLANES.indexOf(this.view), 0);
    const place = this.place;
    [right, up].forEach((count, n) => {
      const axis = this.axes[ACROSS[plane][n]];
      const mirrored = n === 0 && plane < 2 ? -1 : 1; // the patient's right is on the left
      place[axis.array] += count * mirrored * (axis.isFlipped ? -1 : 1);
    });
    this.place = place;
  }

  /** Larger (1), smaller (-1), or as at first (0), around the crosshair. */
  zoom(direction) {
    const nv = this.nv;
    const [x, y, z, before] = nv.scene.pan2Dxyzmm;
    const now = direction ? Math.min(Math.max(before * 1.25 ** direction, 1), 20) : 1;
    const mm = nv.frac2mm(nv.scene.crosshairPos);
    const by = now - before;
    nv.scene.pan2Dxyzmm = now === 1 ? [0, 0, 0, 1] : [x - by * mm[0], y - by * mm[1], z - by * mm[2], now];
    nv.drawScene();
  }

  turn(dx, dy) {
    this.nv.setRenderAzimuthElevation(this.nv.scene.renderAzimuth + dx, this.nv.scene.renderElevation + dy);
  }

  // places on the screen

  /** The tile at a point of the screen: {plane, index}, "render", or null. */
  tileAt(x, y) {
    const dpr = this.nv.uiData.dpr || 1;
    const index = this.nv.tileIndex(x * dpr, y * dpr);
    if (index < 0) return null;
    const plane = this.nv.screenSlices[index].axCorSag;
    return plane >= RENDER ? "render" : { plane, index };
  }

  /** A point of the screen on a tile → place [z, y, x] along the array's axes, from 0 to each side. */
  placeAt(x, y, tile) {
    const dpr = this.nv.uiData.dpr || 1;
    const [left, top, width, height] = edges(this.nv.screenSlices[tile.index].leftTopWidthHeight);
    const inX = Math.min(Math.max(x * dpr, left + 0.01), left + width - 0.01);
    const inY = Math.min(Math.max(y * dpr, top + 0.01), top + height - 0.01);
    const part = this.nv.screenXY2TextureFrac(inX, inY, tile.index, false);
    const out = [0, 0, 0];
    this.axes.forEach(({ array, isFlipped }, axis) => {
      const at = Math.min(Math.max(part[axis], 0), 1) * this.sides[axis];
      out[array] = isFlipped ? this.sides[axis] - at : at;
    });
    out[this.across(tile.plane)] = this.place[this.across(tile.plane)] + 0.5;
    return out;
  }

  /** A place [z, y, x] → the point of the screen on a tile. */
  pointOf(place, tile) {
    const dpr = this.nv.uiData.dpr || 1;
    const [left, top, width, height] = edges(this.nv.screenSlices[tile.index].leftTopWidthHeight);
    const ends = [0.25, 0.75].map((at) => [left + at * width, top + at * height]);
    const parts = ends.map(([x, y]) => this.nv.screenXY2TextureFrac(x, y, tile.index, false));
    return ACROSS[tile.plane].map((axis, n) => {
      const { array, isFlipped } = this.axes[axis];
      const side = this.sides[axis];
      const at = (isFlipped ? side - place[array] : place[array]) / side;
      const slope = (ends[1][n] - ends[0][n]) / (parts[1][axis] - parts[0][axis]);
      return (ends[0][n] + (at - parts[0][axis]) * slope) / dpr;
    });
  }

  drawMarks() {
    const shapes = [];
    if (this.shape) {
      this.nv.screenSlices.forEach(({ axCorSag: plane, AxyzMxy: grid }, index) => {
        if (plane < 3 && grid.length) this.marksOn({ plane, index }, shapes);
      });
    }
    this.overlay.replaceChildren(...shapes);
  }

  marksOn(tile, shapes) {
    const across = this.across(tile.plane);
    const here = this.place[across];
    for (const mark of [...this.marks, ...(this.draft ? [this.draft] : [])]) {
      const colour = mark.colour ?? "#fff";
      if (mark.box) {
        const [first, end] = mark.box[across];
        if (end - first !== 1 || first !== here || mark.across !== across) continue;
        const [ax, ay] = this.pointOf(mark.box.map(([low]) => low), tile);
        const [bx, by] = this.pointOf(mark.box.map(([, high]) => high), tile);
        const where = { x: Math.min(ax, bx), y: Math.min(ay, by), width: Math.abs(bx - ax), height: Math.abs(by - ay) };
        if (mark === this.draft) shapes.push(shape("rect", { ...where, class: "new" }));
        else shapes.push(shape("rect", { ...where, class: "halo" }), shape("rect", { ...where, class: "box", stroke: colour }));
      } else if (mark.point[across] === here) {
        const [x, y] = this.pointOf(mark.point.map((at) => at + 0.5), tile);
        shapes.push(shape("circle", { cx: x, cy: y, r: 8, fill: colour, stroke: "#000", "stroke-width": 1.5 }));
        const sign = shape("text", { x, y, fill: mark.ink });
        sign.textContent = mark.isInside ? "+" : "−";
        shapes.push(sign);
      }
    }
  }
}

function edges([left, top, width, height]) {
  return width < 0 ? [left + width, top, -width, height] : [left, top, width, height];
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
