// Instead of zarrita, whose decoders are larger than all of NiiVue: the page opens no zarr.
const none = () => {
  throw new Error("zarr is not read here");
};
export const FetchStore = none, get = none, open = none, root = none, slice = none;
